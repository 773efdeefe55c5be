"""The methods of a benchmark, and their networks: each is trained once per seed, kept in a folder, and loaded for its rows."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed

from diffusers_cf.baselines import NETWORKS, ROWS, AnomalyMethod, CounterfactualDiffusion, Row, network_of_data, row_of
from diffusers_cf.baselines.student import TaughtSlices, targets_of_maps
from diffusers_cf.baselines.training import set_up_training, train_method
from diffusers_cf.benchmark.presets import Preset
from diffusers_cf.benchmark.protocol import BenchmarkData, as_json, choose_settings
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.chains import maps_of_split
from diffusers_cf.evaluation.postprocessing import PostProcessing
from diffusers_cf.files import make_folder, read_json, write_json
from diffusers_cf.inference import compute_in
from diffusers_cf.provenance import package_commit


RECORD_FILE = "training.json"
NEEDS_FLAIR = ("ours-intensity", "ours-student")
DECIDES_TRAINING = ("image_size", "size", "budget")  # fields of a preset


@dataclass(frozen=True)
class Method:
    """A method of the tables.

    Attributes:
        id (`str`): as in `--methods` and in the file names of results.
        row (`Row`): its title, its tables, the name of its network, and how to make it.
    """

    id: str
    row: Row

    @classmethod
    def of(cls, id: str) -> "Method":
        """Return the method with this id, in any case.

        Raises:
            InputError: there is no such method.
        """
        return cls(id.lower(), row_of(id.lower()))


def methods_for(modalities: Sequence[str]) -> list[Method]:
    """Return every method for images with these modalities, in the order of the tables."""
    ids = []
    for id in ROWS:
        if id == "threshold-<modality>":
            ids += [f"threshold-{modality}" for modality in modalities]
        elif "flair" in modalities or not (id.startswith("threshold") or id in NEEDS_FLAIR):
            ids.append(id)
    return [Method.of(id) for id in ids]


class Networks:
    """Makes methods, and trains the networks that are not trained yet. The network used last stays loaded.

    Args:
        folder (`Path`): holds the trained networks, each in a folder `NAME-seedS`.
        preset (`Preset`): their size and training budget.
        device (`str`): where they run.
        dtype (`torch.dtype`): in which diffusion networks compute at inference.
        images (`Mapping[str, int]`): number of images to train a network on, instead of the time of the budget; may be
            empty.
    """

    def __init__(self, folder: Path, preset: Preset, device: str, dtype: torch.dtype, images: Mapping[str, int]):
        self.folder, self.preset, self.device, self.dtype, self.images = folder, preset, device, dtype, images
        self._loaded: tuple = (None, None, None)

    def check(self, methods: Sequence[Method], data: BenchmarkData) -> None:
        """Build every method without training, and its network without memory for weights.

        Raises:
            InputError: a method can't be made for these images at the preset's size.
        """
        side = self.preset.image_size
        for method in methods:
            if method.row.network is None:
                method.row.make(data.modalities, self.preset.grid)
                continue
            if method.id in NEEDS_FLAIR and "flair" not in data.modalities:
                raise InputError(f"{method.id} needs FLAIR, and {data.folder} holds {', '.join(data.modalities)}")
            try:
                with torch.device("meta"):
                    self._new_network(method.row.network, data)
            except ValueError as error:
                raise InputError(f"--image_size {side} does not suit {method.id}: {error}") from None

    def is_ready(self, method: Method, seed: int) -> bool:
        """Return whether the method can be made without training."""
        return method.row.network is None or (self.folder / f"{method.row.network}-seed{seed}" / RECORD_FILE).is_file()

    def make(self, method: Method, data: BenchmarkData, seed: int) -> tuple[AnomalyMethod, dict]:
        """Return a method ready for inference and what its result says about its training.

        Raises:
            InputError: its network was trained on other slices, at another size or with another budget.
        """
        name, grid = method.row.network, self.preset.grid
        if name is None:
            return method.row.make(data.modalities, grid), {"trained_on": "not trained", "converged": None}
        metadata = {name: value for name, value in asdict(self.preset).items() if name in DECIDES_TRAINING}
        metadata = as_json({"data": data.metadata} | metadata)
        folder = self.folder / f"{name}-seed{seed}"
        if not self.is_ready(method, seed):
            self._train(name, data, seed, folder, metadata)
        network, record = self._load(folder)
        if different := [key for key in metadata if record.get(key) != metadata[key]]:
            raise InputError(f"{folder} was trained with other {', '.join(different)}: choose another --models")
        training = {key: record[key] for key in ("trained_on", "converged", "images_seen", "parameters", "curve")}
        training |= {"train_seconds": record["seconds"], "trained_commit": record["commit"]}
        return method.row.make(network, grid, data.modalities), training

    def _train(self, name: str, data: BenchmarkData, seed: int, folder: Path, metadata: dict) -> None:
        budget, train, validation = self.preset.budget, data.train, data.validation
        if name in self.images:
            budget = replace(budget, seconds=math.inf, steps=math.ceil(self.images[name] / budget.batch_size))
        make_folder(folder)  # a wrong path fails before the training
        if id := NETWORKS[name].teacher:
            teacher, _ = self.make(Method.of(id), data, seed)
            choose_settings(teacher, data)
            splits = train, validation
            maps = (maps_of_split(teacher, split, PostProcessing(), batch_size=data.batch_size) for split in splits)
            targets = [
                targets_of_maps(*found, split.labels, accept_weak=True)
                for found, split in zip(maps, splits, strict=True)
            ]
            train, validation = (TaughtSlices(*pair) for pair in zip(splits, targets, strict=True))
        set_seed(seed)
        network = self._new_network(name, data)
        training = set_up_training(network, train, folder, budget, seed, self.device, metadata)
        record = asdict(train_method(network, validation, training))
        record |= {"trained_on": network.trained_on, "parameters": network.num_parameters()}
        network.save_pretrained(folder)
        write_json(record | metadata | {"commit": package_commit()}, folder / RECORD_FILE)

    def _new_network(self, name: str, data: BenchmarkData) -> torch.nn.Module:
        side = data.size if NETWORKS[name].teacher else self.preset.image_size
        return network_of_data(name, self.preset.size, data.channels, side, data.train.class_names)

    def _load(self, folder: Path) -> tuple[torch.nn.Module, dict]:
        if self._loaded[0] != folder:
            for checkpoint in folder.glob("*checkpoint-*"):  # of the training, which is finished
                shutil.rmtree(checkpoint)
            record = read_json(folder / RECORD_FILE)
            cls = NETWORKS[folder.name.rpartition("-seed")[0]].cls
            network = cls.from_pretrained(folder).to(self.device).eval()
            if isinstance(network, CounterfactualDiffusion):
                compute_in(network.network.unet, self.dtype)
            self._loaded = folder, network, record
        return self._loaded[1:]
