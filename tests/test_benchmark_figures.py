"""Figures of the benchmark from cells that are there already."""

from types import SimpleNamespace

import numpy as np
import torch

from diffusers_cf.benchmark import plots as benchmark_figures


class Slices:
    patients = np.array(["A", "B"])

    def __getitems__(self, rows):
        return rows

    def collate(self, rows):
        return {"images": torch.ones(len(rows), 1, 4, 4), "masks": torch.zeros(len(rows), 4, 4)}


def test_a_cell_that_is_older_than_the_map_keeps_the_rows_own(tmp_path, monkeypatch):
    """The forward map was no `map` of the pipeline once, so its cells name none."""
    seen = []

    class Method:
        whole_patient = False
        settings = {"guidance_scale": 1.5, "strength": 0.2, "num_inference_steps": 20, "map": "forward"}

        def anomaly_map(self, images):
            seen.append(self.settings)
            return images[:, 0]

    cell = {"settings": {"guidance_scale": 16.0, "strength": 0.75, "num_inference_steps": 10}}
    data = SimpleNamespace(test=Slices(), modalities=["flair"])
    benchmark = SimpleNamespace(output=tmp_path, make_method=lambda *_: (Method(), {}))
    monkeypatch.setattr(benchmark_figures, "example_rows", lambda *_: [0, 1])
    benchmark_figures.write_figure2(benchmark, data, 1, {"forward-map": cell})
    assert seen == [cell["settings"] | {"map": "forward"}] * 2 and (tmp_path / "figure2.png").is_file()
