"""Slices in batches: each volume gets its own results back, and a batch that doesn't fit is halved."""

import numpy as np
import pytest
import torch

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.batching import LARGEST_BATCH, map_in_batches


def volumes(*counts):
    """Volumes of so many slices (1, 2, 2), each slice filled with a number of its own."""
    numbers = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    for key, found in zip("abcdefgh", numbers, strict=False):
        yield key, np.broadcast_to(found[:, None, None, None], (len(found), 1, 2, 2)).astype(np.float32)


class Network:
    """Returns each slice's number, and its double; keeps the sizes of its batches."""

    def __init__(self, fits=10**6, error="CUDA out of memory. Tried to allocate 9 GiB"):
        self.sizes, self.fits, self.error = [], fits, error

    def __call__(self, slices):
        self.sizes.append(len(slices))
        if len(slices) > self.fits:
            raise torch.OutOfMemoryError(self.error) if "memory" in self.error else RuntimeError(self.error)
        return slices[:, 0], 2 * slices[:, 0, 0, 0]


def check(results, counts):
    """The results belong to their volumes, slice by slice."""
    for (key, slices), (name, (maps, scores), seconds) in zip(volumes(*counts), results, strict=True):
        assert name == key and np.array_equal(maps, slices[:, 0]) and np.array_equal(scores, 2 * slices[:, 0, 0, 0])
        assert seconds > 0


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, [1] * 9), (2, [2, 2, 2, 2, 1]), (4, [4, 4, 1]), (9, [9]), (50, [9]), (None, [9])]
)
def test_batches_are_full_and_results_find_their_volumes(batch_size, sizes):
    network = Network()
    check(map_in_batches(network, volumes(3, 1, 5), batch_size), (3, 1, 5))
    assert network.sizes == sizes


def test_a_volume_comes_back_before_all_are_read():
    read = []

    def noted():
        for key, slices in volumes(3, 2, 2, 2, 2):
            read.append(key)
            yield key, slices

    results = map_in_batches(Network(), noted(), 2)
    assert next(results)[0] == "a" and read == ["a", "b", "c"]
    assert next(results)[0] == "b" and read == ["a", "b", "c", "d"]


def test_one_batch_is_on_its_way_while_the_one_before_is_read(monkeypatch):
    from diffusers_cf import batching

    order, receive = [], batching._receive
    monkeypatch.setattr(
        batching, "_receive", lambda sent, bar: order.append("read" if sent else "-") or receive(sent, bar)
    )
    network = Network()
    list(map_in_batches(lambda slices: order.append("call") or network(slices), volumes(6), 2))
    assert order == ["call", "-", "call", "read", "call", "read", "read"]


def test_the_largest_batch_that_fits_is_found_once_and_kept():
    network = Network(fits=300)
    counts = (700, 800, 600)
    check(map_in_batches(network, volumes(*counts), None, device="meta"), counts)
    # 1,024 and 512 don't fit: what was gathered goes in parts of 256, and so does all that follows
    assert network.sizes == [LARGEST_BATCH, 512] + [256] * 8 + [2100 - 8 * 256]


def test_want_of_memory_is_said_in_one_line():
    with pytest.raises(InputError, match="out of memory with --batch_size 8: try 4, or auto"):
        list(map_in_batches(Network(fits=5), volumes(20), 8))
    with pytest.raises(InputError, match="out of memory with a single slice at a time"):
        list(map_in_batches(Network(fits=0), volumes(3), None))


def test_other_errors_and_wrong_results_are_not_taken_for_want_of_memory():
    with pytest.raises(RuntimeError, match="no kernel"):
        list(map_in_batches(Network(fits=0, error="no kernel"), volumes(3), None))
    with pytest.raises(ValueError, match=r"3 slices became \(2, 1, 2, 2\)"):
        list(map_in_batches(lambda slices: slices[1:], volumes(3), None))
