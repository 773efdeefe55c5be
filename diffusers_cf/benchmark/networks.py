"""The trained networks of a benchmark: each is trained once a seed, kept in a folder, and loaded for its rows."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed

from diffusers_cf.baselines import NETWORKS, CounterfactualDiffusion, TrainableMethod, network_of_data
from diffusers_cf.baselines.training import Budget, MethodTraining
from diffusers_cf.benchmark.presets import Preset
from diffusers_cf.benchmark.protocol import BenchmarkData, as_json
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.protocol import write_result
from diffusers_cf.precision import compute_in
from diffusers_cf.provenance import package_commit


RECORD_FILE = "training.json"


def preset_facts(preset: Preset) -> dict:
    """What of a preset decides what a network learns."""
    return {"image_size": preset.image_size, "size": preset.size, "budget": asdict(preset.budget)}


def check_sizes(names: list[str], preset: Preset, channels: int) -> None:
    """Builds networks of `NETWORKS` without memory for their weights.

    Raises:
        InputError: one can't be built for images of these channels at the preset's size.
    """
    for name in names:
        try:
            with torch.device("meta"):
                network_of_data(name, preset.size, channels, preset.image_size, ("healthy", "unhealthy"))
        except ValueError as error:
            raise InputError(f"--image_size {preset.image_size} does not suit {name}: {error}") from None


class Networks:
    """Trains what isn't trained yet; the network used last stays loaded.

    Args:
        folder: of the trained networks, `NAME-seedS` each.
        preset: their sizes and budget.
        device: where they run.
        dtype: of diffusion networks at inference.
        images: of each network, in the place of the budget's seconds: what it saw in the same time elsewhere.
    """

    def __init__(
        self,
        folder: Path,
        preset: Preset,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        images: Mapping[str, int] | None = None,
    ):
        self.folder, self.preset, self.device, self.dtype = Path(folder), preset, device, dtype
        self.images = images or {}
        self._loaded: tuple = (None, None, None)

    def is_trained(self, name: str, seed: int) -> bool:
        """Whether there is something to load."""
        return (self.folder / f"{name}-seed{seed}" / RECORD_FILE).is_file()

    def get(self, name: str, data: BenchmarkData, seed: int) -> tuple[TrainableMethod, dict]:
        """A network of `NETWORKS` ready for inference, and its training record.

        Args:
            name: key of `NETWORKS`.
            data: whose training slices it learns from, where it must.
            seed: of the training.

        Raises:
            InputError: there is one, but of other slices, another size or another budget.
        """
        folder = self.folder / f"{name}-seed{seed}"
        facts = as_json({"data": data.facts, **preset_facts(self.preset)})
        if not self.is_trained(name, seed):
            self._train(name, data, seed, folder, facts)
        if self._loaded[0] != folder:
            _remove_checkpoints(folder)
            network = NETWORKS[name].cls.from_pretrained(folder).to(self.device).eval()
            if isinstance(network, CounterfactualDiffusion):
                compute_in(network.network.unet, self.dtype)
            self._loaded = folder, network, _record(folder / RECORD_FILE)
        _, network, record = self._loaded
        if different := [key for key in facts if record.get(key) != facts[key]]:
            raise InputError(f"{folder} was trained with other {', '.join(different)}: choose another --models")
        return network, record

    def budget_of(self, name: str) -> Budget:
        """How long a network is trained: the preset's budget, or so many images and no limit of time."""
        if name not in self.images:
            return self.preset.budget
        steps = math.ceil(self.images[name] / self.preset.budget.batch_size)
        return replace(self.preset.budget, seconds=math.inf, steps=steps)

    def _train(self, name: str, data: BenchmarkData, seed: int, folder: Path, facts: dict) -> None:
        set_seed(seed)
        size, side, budget = self.preset.size, self.preset.image_size, self.budget_of(name)
        network = network_of_data(name, size, data.channels, side, data.train.class_names)
        training = MethodTraining(network, data.train, data.validation, folder, budget, seed, self.device, facts)
        record = asdict(training.run()) | {"trained_on": network.trained_on, "parameters": network.num_parameters()}
        network.save_pretrained(folder)
        write_result(record | facts | {"commit": package_commit()}, folder / RECORD_FILE)


def _record(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}): remove its folder to train again") from None


def _remove_checkpoints(folder: Path) -> None:
    """Those of a finished training, and what a killed process left half-written."""
    for pattern in ("checkpoint-*", ".checkpoint-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
