"""The trained networks of a benchmark: each is trained once a seed, kept in a folder, and loaded for its rows."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import set_seed

from diffusers_cf.baselines import NETWORKS, CounterfactualDiffusion, TrainableMethod, network_of_data
from diffusers_cf.baselines.training import MethodTraining
from diffusers_cf.benchmark_presets import Preset
from diffusers_cf.evaluation import write_result
from diffusers_cf.provenance import package_commit


RECORD_FILE = "training.json"


class Networks:
    """Trains what isn't trained yet; the network used last stays loaded.

    Args:
        folder: of the trained networks, `NAME-seedS` each.
        preset: their sizes and budget.
        device: where they run.
        dtype: of diffusion networks at inference.
    """

    def __init__(self, folder: Path, preset: Preset, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.folder, self.preset, self.device, self.dtype = Path(folder), preset, device, dtype
        self._loaded: tuple = (None, None, None)

    def get(self, name: str, train, validation, seed: int) -> tuple[TrainableMethod, dict]:
        """A network of `NETWORKS` ready for inference, and its training record.

        Args:
            name: key of `NETWORKS`.
            train: `SliceDataset` to train on, where it must be.
            validation: `SliceDataset` of the validation curve.
            seed: of the training.
        """
        folder = self.folder / f"{name}-seed{seed}"
        if not (folder / RECORD_FILE).is_file():
            self._train(name, train, validation, seed, folder)
        if self._loaded[0] != folder:
            network = NETWORKS[name].cls.from_pretrained(folder).to(self.device).eval()
            if isinstance(network, CounterfactualDiffusion):
                network.network.to(self.dtype)
            self._loaded = folder, network, json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        return self._loaded[1:]

    def _train(self, name: str, train, validation, seed: int, folder: Path) -> None:
        set_seed(seed)
        size, side = self.preset.size, self.preset.image_size
        network = network_of_data(name, size, train.preprocessing["channels"], side, train.class_names)
        training = MethodTraining(network, train, validation, folder, self.preset.budget, seed, self.device)
        record = asdict(training.run()) | {"trained_on": network.trained_on, "parameters": network.num_parameters()}
        network.save_pretrained(folder)
        write_result(record | {"budget": asdict(self.preset.budget), "commit": package_commit()}, folder / RECORD_FILE)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
