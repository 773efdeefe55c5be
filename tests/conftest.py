"""Small seeded pipelines with an untrained U-Net or an exact noise predictor, and a Hub on loopback."""

import os
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from hub_client import client_process
from hub_server import HubServer
from model_files import UNCONDITIONAL, tiny_unet
from segmentation_files import make_pipe
from training_data import write_training_set

from diffusers_cf import ClassTokenEncoder, CounterfactualDDIMPipeline
from diffusers_cf.schedulers import DynamicDDIMInverseScheduler, DynamicDDIMScheduler


# With several threads, rounding depends on the memory addresses of the weights, and parallel test runs and the
# processes that tests start compete for the processors.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


class GaussianNoisePredictor(ModelMixin, ConfigMixin):
    """The exact noise predictor of independent pixels from N(mean, std^2); the mean is in the class tokens, else 0."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 2, std: float = 0.2):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.alphas_cumprod = DDIMScheduler().alphas_cumprod

    def forward(self, sample, timestep, encoder_hidden_states=None, class_labels=None):
        alpha = self.alphas_cumprod[int(timestep)]
        if encoder_hidden_states is not None:
            sample = sample - alpha.sqrt() * encoder_hidden_states[:, 0, 0].reshape(-1, 1, 1, 1)
        return SimpleNamespace(sample=(1 - alpha).sqrt() * sample / (alpha * self.config.std**2 + 1 - alpha))


@pytest.fixture
def make_pipeline():
    """Return a function that makes a pipeline without progress bar, from two schedulers or from options for ours.

    Its network is a U-Net with class encoder, or without one if `unconditional`, or exact if `gaussian`.
    """

    def make(schedulers=None, gaussian=False, unconditional=False, fixed_point=0, **options):
        torch.manual_seed(0)
        scheduler, inverse = schedulers or (
            DynamicDDIMScheduler(**options),
            DynamicDDIMInverseScheduler(num_fixed_point_iterations=fixed_point, **options),
        )
        unet = GaussianNoisePredictor() if gaussian else tiny_unet(**UNCONDITIONAL if unconditional else {})
        encoder = None
        if not (gaussian or unconditional):
            encoder = ClassTokenEncoder(num_tokens=2, token_dim=8, vector_dim=32, embedding_dim=8)
            encoder.to_vector[2].weight.data *= 5  # classes that matter, without training
        pipe = CounterfactualDDIMPipeline(unet.eval(), encoder, scheduler, inverse)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(make_pipeline):
    """A conditional pipeline with an untrained U-Net and our two schedulers."""
    return make_pipeline()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The saved model folder of `make_pipe`, for commands that segment."""
    folder = tmp_path_factory.mktemp("model") / "model"
    make_pipe().save_pretrained(folder)
    return folder


@pytest.fixture
def files(make_pipeline, tmp_path):
    """A model that recommends nothing and a data set, of 2 channels, 8 x 8 and 16 x 16 pixels."""
    pipe = make_pipeline()
    pipe.preprocessing = {"modalities": ["flair", "t1"]}
    pipe.save_pretrained(tmp_path / "model")
    write_training_set(tmp_path / "slices")
    return tmp_path


@pytest.fixture
def record_calls():
    """Return a function that makes a pipeline's U-Net record `(sample, timestep, tokens, vector)` of each call."""

    def record(pipe):
        calls = []

        def note(module, args, kwargs):
            tokens, vector = kwargs["encoder_hidden_states"], kwargs["class_labels"]
            calls.append(SimpleNamespace(sample=args[0], timestep=int(args[1]), tokens=tokens, vector=vector))

        pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
        return calls

    return record


@pytest.fixture
def images():
    """Four images `(4, 2, 8, 8)` in [0, 1] with a background of 0."""
    images = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    images[:, :, :2] = 0
    return images


@pytest.fixture(scope="module")
def hub():
    """A Hub on 127.0.0.1."""
    server = HubServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Calls a function in a process of its own, whose Hub is the stand-in."""
    with client_process(hub.environment(tmp_path_factory.mktemp("home"))) as call:
        yield call
