"""Slices in batches: each volume gets its own results, and a batch that does not fit is halved."""

import numpy as np
import pytest
import torch

from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.batching import LARGEST_BATCH, map_in_batches


def volumes(*counts):
    """Yield volumes with these numbers of slices `(1, 2, 2)`, each slice filled with its own number."""
    numbers = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    for key, found in zip("abcdefgh", numbers, strict=False):
        yield key, np.broadcast_to(found[:, None, None, None], (len(found), 1, 2, 2)).astype(np.float32)


class Network:
    """Return each slice's number and its double; record the sizes of batches."""

    def __init__(self, fits=10**6, error="CUDA out of memory. Tried to allocate 9 GiB"):
        self.sizes, self.fits, self.error = [], fits, error

    def __call__(self, slices):
        self.sizes.append(len(slices))
        if len(slices) > self.fits:
            raise torch.OutOfMemoryError(self.error) if "memory" in self.error else RuntimeError(self.error)
        return slices[:, 0], 2 * slices[:, 0, 0, 0]


def check(results, counts):
    """Check that each volume has the results of its own slices."""
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


def test_a_volume_comes_back_one_batch_later_and_before_all_are_read():
    """The next batch is started before the results of the previous one are read."""
    read = []

    def noted():
        for key, slices in volumes(3, 2, 2, 2, 2):
            read.append(key)
            yield key, slices

    network = Network()
    results = map_in_batches(network, noted(), 2)
    assert next(results)[0] == "a" and read == ["a", "b", "c"] and len(network.sizes) == 3
    assert next(results)[0] == "b" and read == ["a", "b", "c", "d"]


def test_the_largest_batch_that_fits_is_found_once_and_kept():
    network, counts = Network(fits=300), (700, 800, 600)
    check(map_in_batches(network, volumes(*counts), None, device="meta"), counts)
    assert network.sizes == [LARGEST_BATCH, 512] + [256] * 8 + [2100 - 8 * 256]


def test_running_out_of_memory_is_one_line():
    with pytest.raises(InputError, match="out of memory with a batch of 8"):
        list(map_in_batches(Network(fits=5), volumes(20), 8))
    with pytest.raises(InputError, match="out of memory with a batch of 1"):
        list(map_in_batches(Network(fits=0), volumes(3), None))


def test_other_errors_and_wrong_results_are_not_taken_for_lack_of_memory():
    with pytest.raises(RuntimeError, match="no kernel"):
        list(map_in_batches(Network(fits=0, error="no kernel"), volumes(3), None))
    with pytest.raises(ValueError, match="for 3 slices"):
        list(map_in_batches(lambda slices: slices[1:], volumes(3), None))
