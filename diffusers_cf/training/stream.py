"""Training on slices that are read while it goes on, in the place of drawing from all of them."""

from collections.abc import Iterable, Iterator

import numpy as np

from diffusers_cf.errors import InputError
from diffusers_cf.training.loop import TrainingImages


class TrainingStream(TrainingImages):
    """Endless training set from a stream, classes balanced in expectation.

    One pool a class holds the slices read last. For each image trained, one slice is read and takes the place of
    another in the pool of its class; then a class is drawn uniformly, and a slice of its pool uniformly. So a slice is
    drawn as often on average as by [`TrainingSlices`], rare classes oftener than they are read, but only while it is in
    its pool: neighbours in time come from as many patients as the pools hold. Which images a position has depends on
    the number of processes and, after a resume, on where the run was stopped: the stream goes on at the row where it
    was, with pools filled anew from there. Noise, timesteps, augmentation and dropped conditions stay functions of
    seed and position.

    Args:
        slices: a `SliceStream`.
        seed (`int`): of the run.
        image_size (`tuple[int, int]`): height and width of the network's input.
        buffer_size (`int`): slices in all pools of a process together.
        **options: the others of [`TrainingImages`].

    Raises:
        InputError: the training split is empty.
    """

    def __init__(self, slices, seed: int, image_size: tuple[int, int], buffer_size: int = 2048, **options):
        super().__init__(slices, seed, image_size, **options)
        self.num_slices = len(slices)
        if not self.num_slices:
            raise InputError(f"{slices.folder}: the training split is empty")
        self.capacity = max(1, buffer_size // len(slices.class_names))

    def classes(self) -> set[int]:
        """Indices of the classes that have slices: of two by the counts of preprocessing.json, else by all labels."""
        counts = self.slices.preprocessing["splits"]["train"]
        if len(self.slices.class_names) != 2 or "unhealthy" not in counts:
            return set(self.slices.labels.tolist())
        by_class = (counts["slices"] - counts["unhealthy"], counts["unhealthy"])
        return {label for label, count in enumerate(by_class) if count}

    @property
    def num_patients(self) -> int | None:
        """Patients of the training split; None where preprocessing.json does not say."""
        return self.slices.preprocessing["splits"]["train"].get("patients")

    def batches(
        self, positions: Iterable[list[int]], num_workers: int = 0, pin_memory: bool = False
    ) -> Iterator[list[dict]]:
        """Batches, as `collate_parts` makes them, for lists of global positions.

        `positions` is a [`PositionBatches`], which knows process and step.
        """
        images_before = positions.steps.start * positions.parts * positions.batch_size
        rows = self.slices.endless_rows(self.seed, positions.rank, positions.world_size, skip=images_before)
        random = np.random.default_rng([self.seed, positions.rank, positions.steps.start])
        pools = self._filled_pools(rows, random, positions.world_size)
        for batch in positions:
            yield self.collate_parts([(position, self._drawn(pools, next(rows), random)) for position in batch])

    def _filled_pools(self, rows: Iterator[dict], random: np.random.Generator, world_size: int) -> dict[int, list]:
        """Pools after the first rows: as many as all pools hold, more where a class is still missing.

        Raises:
            InputError: there is no slice of a class that the counts of preprocessing.json promise.
        """
        pools, missing, read = {}, self.classes(), 0
        wanted = min(self.num_slices // world_size, self.capacity * len(missing))
        while read < wanted or missing:
            if read > 2 * self.num_slices:
                name = self.slices.class_names[min(missing)]
                raise InputError(f"{self.slices.folder}: no slice to train on is labelled {name}")
            row = next(rows)
            self._take_in(pools, row, random)
            missing.discard(row["label"])
            read += 1
        return pools

    def _take_in(self, pools: dict[int, list[dict]], row: dict, random: np.random.Generator) -> None:
        pool = pools.setdefault(row["label"], [])
        if len(pool) < self.capacity:
            pool.append(row)
        else:
            pool[random.integers(self.capacity)] = row

    def _drawn(self, pools: dict[int, list[dict]], row: dict, random: np.random.Generator) -> dict:
        self._take_in(pools, row, random)
        pool = pools[sorted(pools)[random.integers(len(pools))]]
        return pool[random.integers(len(pool))]
