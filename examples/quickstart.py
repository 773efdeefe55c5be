"""Finds the lesion of one phantom slice with the model that ships, and writes what it saw to quickstart.png."""

from pathlib import Path

import torch

import diffusers_cf
from diffusers_cf.data.phantom import PhantomSource
from diffusers_cf.plots import plot_slices


def main(output: Path = Path("quickstart.png")) -> None:
    """Cohort 1 of the phantom: the model has seen cohort 0 alone."""
    model = Path(diffusers_cf.__file__).parent / "pretrained" / "phantom_small"
    pipe = diffusers_cf.CounterfactualDDIMPipeline.from_pretrained(model)

    source = PhantomSource(seed=1, patients=3)
    patient = source.read(source.patients()[0])
    middle = int(patient.masks.sum(axis=(1, 2)).argmax())
    images = torch.from_numpy(patient.images[middle : middle + 1])  # (1, 4, 128, 128)

    out = pipe(images, target="healthy", output_type="np")
    plot_slices(
        output,
        images.numpy(),
        out.counterfactuals,
        out.heatmaps,
        references=patient.masks[middle : middle + 1],
        channel_names=source.modalities,
        convention="radiological",
    )


if __name__ == "__main__":
    main()
