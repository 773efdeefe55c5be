"""Pipelines and patients for the tests of `segment` and `report`, and how to read their results."""

import html
import re

import nibabel as nib
import numpy as np
import torch
from data_files import save

from diffusers_cf.cli import main
from diffusers_cf.models import class_token_encoder, counterfactual_unet
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline, CounterfactualOutput
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


SIZE, MODALITIES = 16, ["flair", "t1"]
SETTINGS = {"guidance_scale": 2.0, "strength": 0.2, "num_inference_steps": 10, "threshold": 0.05}
CUBE = np.s_[3:8, 22:28, 7:10]


def make_pipe(pipeline_class=CounterfactualDDIMPipeline, seed=0, **preprocessing):
    """An untrained pipeline of two modalities."""
    torch.manual_seed(seed)
    unet = counterfactual_unet("small", image_size=SIZE, num_channels=len(MODALITIES))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    scheduler = DynamicDDIMScheduler()
    inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config)
    pipe = pipeline_class(unet, class_token_encoder("small"), scheduler, inverse)
    pipe.preprocessing = {"modalities": MODALITIES, "size": SIZE, "settings": SETTINGS} | preprocessing
    pipe.set_progress_bar_config(disable=True)
    return pipe


class BrightnessPipeline(CounterfactualDDIMPipeline):
    """The heatmap is the brightness of the first channel, the counterfactual is `factor` times the image."""

    factor = 0.5

    def __call__(self, images, output_type="pt", **settings):
        return CounterfactualOutput(images[:, 0], self.factor * images, images)


def write_cube(folder, flair_axes, t1_axes):
    """Write a patient with a bright cube, `CUBE`, in a corner of a grey block, RAS (26, 32, 12); t1 is 3 times flair."""
    flair = np.zeros((26, 32, 12), dtype=np.int16)
    flair[2:24, 3:30, 1:11] = 100
    flair[CUBE] = 1000
    folder.mkdir()
    save(folder / f"{folder.name}_flair.nii.gz", flair, flair_axes)
    save(folder / f"{folder.name}_T1n.nii.gz", 3 * flair, t1_axes)
    return folder


def voxels(path):
    return np.asanyarray(nib.load(path).dataobj)


def cli(*arguments):
    """Exit code of `diffusers-cf ARGUMENTS`."""
    return main([str(argument) for argument in arguments])


def error_lines(printed):
    """The lines that tell errors on stderr, from `capsys.readouterr()` or a process."""
    text = getattr(printed, "stderr", None) or printed.err
    return [line for line in text.splitlines() if line.startswith("error: ")]


def text_of(page):
    """The text of a report without viewers, scripts and tags."""
    page = re.sub(r'srcdoc="[^"]*"|<script>.*?</script>|<style>.*?</style>', "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def foreign_addresses(page):
    """Every address in a page, scripts and viewers included, that a browser would load from the network."""
    for _ in range(2):  # a viewer is a page in an attribute, and may itself hold pages in attributes
        page = html.unescape(page)
    attributes = r"""(?:\b(?:src|href|action|data|poster)\s*=|\burl\(|@import)\s*["']?([^"'\s>);]+)"""
    return [found for found in re.findall(attributes, page) if re.match(r"(?i)(?:https?:|ftp:|wss?:)?//", found)]
