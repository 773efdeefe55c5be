"""All methods of the tables, as data. A method maps images `(N, C, H, W)` to `(N, H, W)`, higher = more lesion.

To add a baseline, write its class in a module of this folder and add a line to `ROWS`, and to `NETWORKS` if it is
trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffusers_cf.baselines.cam import ClassActivationMap
from diffusers_cf.baselines.combination import IntensityCombination
from diffusers_cf.baselines.dae import DenoisingAutoencoder
from diffusers_cf.baselines.diffusion import (
    ClassifierGuidedDiffusion,
    CounterfactualDiffusion,
    CounterfactualMap,
    HealthyDiffusion,
)
from diffusers_cf.baselines.fanogan import FAnoGAN
from diffusers_cf.baselines.method import AnomalyMethod, Grid, TrainableMethod
from diffusers_cf.baselines.student import Student
from diffusers_cf.baselines.thresholding import (
    EqualizedThresholding,
    IntensityThresholding,
    MedianThresholding,
    RobustZThresholding,
)
from diffusers_cf.baselines.vae import VAERestoration, VariationalAutoencoder
from diffusers_cf.errors import InputError


@dataclass(frozen=True)
class Network:
    """A network that is trained once for each seed and serves one row or several."""

    cls: type[TrainableMethod]
    paper: Mapping  # arguments beside `num_channels` and `image_size`, at the size of its paper
    small: Mapping = field(default_factory=dict)  # the same at a size for CPUs
    teacher: str | None = None  # id of the method whose maps it learns; its input then has the size of the slices


@dataclass(frozen=True)
class Row:
    """A row of Table 1, Table 2 or both."""

    title: str
    tables: tuple[int, ...]
    network: str | None = None  # key of `NETWORKS`; None if nothing is trained
    # makes the method from the trained network or from the names of the channels; None: the network is the method
    method: Callable[..., AnomalyMethod] | None = None
    options: Mapping = field(default_factory=dict)  # keyword arguments of `method`

    with_intensity: bool = False  # whether the map is combined with the intensity of FLAIR

    def make(
        self, source: TrainableMethod | Sequence[str], grid: Grid | None = None, modalities: Sequence[str] = ()
    ) -> AnomalyMethod:
        """Return the method of this row.

        Args:
            source (`TrainableMethod` or `Sequence[str]`): the trained network, or names of the channels in their order.
            grid (`Grid`, *optional*): settings of inference to choose from; the first candidate is in use.
            modalities (`Sequence[str]`): names of the channels, for a combination with intensity.
        """
        method = self.method(source, **self.options) if self.method else source
        if self.with_intensity:
            method = IntensityCombination(method, modalities)
        if grid is not None:
            method.candidates = method.candidates_on(grid)
            method.settings = dict(method.candidates[0])
        return method


PAPER_UNET = {
    "unet_size": "paper", "learning_rate": 1e-4, "first_timesteps": 1.0, "snr_gamma": None, "cosine": False,
    "clip_input": False,
}  # fmt: skip
UNCONDITIONAL, ADAGN = {"conditioning": "unconditional"}, {"conditioning": "adagn"}
PAPER_GAN = {"block_out_channels": (64, 128, 256, 512, 512), "encoder_from": 0.75, "encoder_learning_rate": 5e-5}
PAPER_VAE = {"base_channels": 16, "max_channels": 512, "bottleneck_side": 2, "latent_dim": 512, "learning_rate": 1e-4}
PAPER_DAE = {"block_out_channels": (64, 128, 256, 512), "learning_rate": 1e-4, "num_half_cycles": 21}

NETWORKS = {
    "fanogan": Network(FAnoGAN, PAPER_GAN),
    "vae": Network(VariationalAutoencoder, PAPER_VAE),
    "dae": Network(DenoisingAutoencoder, PAPER_DAE),
    "cdpm-healthy": Network(HealthyDiffusion, UNCONDITIONAL | PAPER_UNET, UNCONDITIONAL),
    "cdpm-classifier": Network(ClassifierGuidedDiffusion, UNCONDITIONAL | PAPER_UNET, UNCONDITIONAL),
    "cdpm-adagn": Network(CounterfactualDiffusion, ADAGN | PAPER_UNET, ADAGN),
    "ours": Network(CounterfactualDiffusion, PAPER_UNET),
    # two stages at 64 pixels: a map of 8 x 8, where a ResNet-18 would leave one of 2 x 2
    "cam": Network(ClassActivationMap, {"hidden_sizes": (128, 256), "depths": (4, 4)}),
    "ours-student": Network(Student, {}, teacher="ours-intensity"),
    "threshold-student": Network(Student, {}, teacher="threshold-robust-z"),
}

# Other diffusion models clip x0 to [-1, 1], as their authors do. No clipping is a row of Table 2.
CLIPPED = {"thresholding": False, "clip_sample": True}
UNCLIPPED = {"thresholding": False, "clip_sample": False}
HEALTHY, GUIDED = {"scales": (0.0,)} | CLIPPED, {"scales": "classifier_scales"} | CLIPPED
RAW, FIXED_POINT = {"use_clipped_model_output": False}, {"encoding": {"num_fixed_point_iterations": 3}}
RECONSTRUCTION, SIGNED, SECOND = {"kind": "reconstruction"}, {"kind": "signed"}, {"solver_order": 2}
FORWARD, DELTA = {"kind": "forward"}, {"kind": "delta"}

# Method id: Row, in the order of Table 1, then of Table 2.
ROWS = {
    "threshold": Row("Thresholding, equalised FLAIR", (1,), None, EqualizedThresholding),
    "threshold-median": Row("Threshold of FLAIR / median", (1,), None, MedianThresholding),
    "threshold-robust-z": Row("Threshold of FLAIR, robust z", (1,), None, RobustZThresholding),
    "threshold-<modality>": Row("Threshold of {}", (1,), None, IntensityThresholding),
    "fanogan": Row("f-AnoGAN", (1,), "fanogan"),
    "vae": Row("VAE, reconstruction", (1,), "vae"),
    "vae-restoration": Row("VAE, restoration", (1,), "vae", VAERestoration),
    "dae": Row("DAE", (1,), "dae"),
    "cdpm-healthy": Row("CDPM, healthy only", (1, 2), "cdpm-healthy", CounterfactualMap, HEALTHY),
    "cdpm-classifier": Row("CDPM + classifier guidance", (1, 2), "cdpm-classifier", CounterfactualMap, GUIDED),
    "cdpm-adagn": Row("CDPM with AdaGN, w = 1", (2,), "cdpm-adagn", CounterfactualMap, {"scales": (1.0,)} | CLIPPED),
    "cdpm-adagn-guided": Row("CDPM with AdaGN, implicit guidance", (2,), "cdpm-adagn", CounterfactualMap, CLIPPED),
    "ours-clipped": Row("Attention conditioning, static clip", (2,), "ours", CounterfactualMap, CLIPPED),
    "ours-unclipped": Row("Attention conditioning, no clip", (2,), "ours", CounterfactualMap, UNCLIPPED),
    "ours": Row("Ours (with dynamic normalisation)", (1, 2), "ours", CounterfactualMap),
    "ours-raw-epsilon": Row("Ours, raw epsilon", (2,), "ours", CounterfactualMap, RAW),
    "ours-reconstruction": Row("Ours, reconstruction as reference", (2,), "ours", CounterfactualMap, RECONSTRUCTION),
    "ours-fixed-point": Row("Ours, fixed-point inversion", (2,), "ours", CounterfactualMap, FIXED_POINT),
    "forward-map": Row("Forward map of our model", (1,), "ours", CounterfactualMap, FORWARD),
    "delta-map": Row("Delta map of our model", (1,), "ours", CounterfactualMap, DELTA),
    "ours-signed": Row("Ours, signed, second order", (1,), "ours", CounterfactualMap, SIGNED | SECOND),
    "ours-intensity": Row("Forward map, with intensity", (1,), "ours", CounterfactualMap, FORWARD, True),
    "ours-student": Row("Student of the forward map with intensity", (1,), "ours-student"),
    "threshold-student": Row("Student of the robust z threshold", (1,), "threshold-student"),
    "cam": Row("Class activation map", (1,), "cam"),
}


def row_of(method: str) -> Row:
    """Return the row of a method id such as `ours` or `threshold-flair`.

    Raises:
        InputError: there is no such method.
    """
    if method in ROWS and "<" not in method:
        return ROWS[method]
    family, _, modality = method.partition("-")
    if family == "threshold" and modality:
        row = ROWS["threshold-<modality>"]
        return replace(row, title=row.title.format(modality), options={"modality": modality})
    raise InputError(f"there is no method {method}; the methods are {', '.join(ROWS)}")


def make_baseline(method: str, modalities: Sequence[str]) -> AnomalyMethod:
    """Return a method that needs no training, for images with these modalities.

    Args:
        method (`str`): id of a row without a network, such as `threshold` or `threshold-t1`.
        modalities (`Sequence[str]`): names of the channels, in their order.

    Raises:
        InputError: there is no such method, it must be trained first, or the images lack its modality.
    """
    row = row_of(method)
    if row.network:
        raise InputError(f"method {method} must be trained first: diffusers-cf benchmark --methods {method}")
    return row.make(modalities)


def network_of_data(name: str, size: str, num_channels: int, image_size: int, class_names) -> TrainableMethod:
    """Return a newly initialised network of `NETWORKS`.

    Args:
        name (`str`): key of `NETWORKS`.
        size (`str`): `small` or `paper`.
        num_channels (`int`): image channels.
        image_size (`int`): side of the network's input in pixels.
        class_names (`Sequence[str]`): healthy first; only the diffusion models use them.
    """
    network = NETWORKS[name]
    arguments = dict(getattr(network, size))
    if issubclass(network.cls, CounterfactualDiffusion):
        arguments["class_names"] = tuple(class_names)
    return network.cls(num_channels=num_channels, image_size=image_size, **arguments)
