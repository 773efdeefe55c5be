"""Every row of the tables behind one contract: `anomaly_map(images (N, C, H, W)) -> (N, H, W)`, higher = more lesion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusers_cf.baselines.cam import ClassActivationMap
from diffusers_cf.baselines.dae import DenoisingAutoencoder
from diffusers_cf.baselines.diffusion import (
    ClassifierGuidedDiffusion,
    CounterfactualDiffusion,
    CounterfactualMap,
    HealthyDiffusion,
)
from diffusers_cf.baselines.fanogan import FAnoGAN
from diffusers_cf.baselines.method import AnomalyMethod, TrainableMethod
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
    """What is trained once a seed, and serves one row or several.

    Attributes:
        cls: a `TrainableMethod`.
        small: its arguments beside `num_channels` and `image_size`, for a CPU.
        paper: the same at the size of its paper.
    """

    cls: type[TrainableMethod]
    small: dict
    paper: dict


PAPER_UNET = {"unet_size": "paper", "learning_rate": 1e-4, "first_timesteps": 1.0}
UNCONDITIONAL = {"conditioning": "unconditional"}
NETWORKS = {
    "fanogan": Network(
        FAnoGAN,
        {},
        {"block_out_channels": (64, 128, 256, 512, 512), "encoder_from": 0.75, "encoder_learning_rate": 5e-5},
    ),
    "vae": Network(
        VariationalAutoencoder,
        {},
        {"base_channels": 16, "max_channels": 512, "bottleneck_side": 2, "latent_dim": 512, "learning_rate": 1e-4},
    ),
    "dae": Network(
        DenoisingAutoencoder,
        {},
        {"block_out_channels": (64, 128, 256, 512), "learning_rate": 1e-4, "num_half_cycles": 21},
    ),
    "cdpm-healthy": Network(HealthyDiffusion, UNCONDITIONAL, UNCONDITIONAL | PAPER_UNET),
    "cdpm-classifier": Network(ClassifierGuidedDiffusion, UNCONDITIONAL, UNCONDITIONAL | PAPER_UNET),
    "cdpm-adagn": Network(CounterfactualDiffusion, {"conditioning": "adagn"}, {"conditioning": "adagn"} | PAPER_UNET),
    "ours": Network(CounterfactualDiffusion, {}, PAPER_UNET),
    # two stages at 64 pixels: a map of 8 x 8, where a ResNet-18 would leave one of 2 x 2
    "cam": Network(ClassActivationMap, {}, {"hidden_sizes": (128, 256), "depths": (4, 4)}),
}


@dataclass(frozen=True)
class Grid:
    """Settings of inference that are chosen on validation slices.

    Attributes:
        num_inference_steps: of every diffusion model's full grid, not chosen but fixed.
        guidance_scales: values of w.
        strengths: values of L.
        classifier_scales: values of s, for classifier guidance.
        restoration_steps: of gradient ascent, for the restored VAE; None for its default.
    """

    num_inference_steps: int
    guidance_scales: tuple[float, ...]
    strengths: tuple[float, ...]
    classifier_scales: tuple[float, ...]
    restoration_steps: int | None = None

    def settings(self, scales: Sequence[float], kind: str = "counterfactual") -> list[dict]:
        """Every combination of these scales with the strengths."""
        fixed = {"num_inference_steps": self.num_inference_steps, "map": kind}
        return [{"guidance_scale": w, "strength": s} | fixed for s in self.strengths for w in scales]


@dataclass(frozen=True)
class Row:
    """A row of Table 1, Table 2 or both.

    Attributes:
        title: as printed.
        tables: 1, 2 or both.
        network: key of `NETWORKS`; None where nothing is trained.
        make: `(trained network or modalities, Grid) -> AnomalyMethod`.
    """

    title: str
    tables: tuple[int, ...]
    network: str | None
    make: Callable[..., AnomalyMethod]


def _itself(trained: TrainableMethod, grid: Grid) -> AnomalyMethod:
    return trained


def _counterfactual(scales: Sequence[float] | str, kind: str = "counterfactual", **options) -> Callable:
    """Makes a diffusion row: `scales` are values, or the name of those in the grid; options as in `CounterfactualMap`."""

    def make(trained: CounterfactualDiffusion, grid: Grid) -> CounterfactualMap:
        method = CounterfactualMap(trained, **options)
        method.choose_among(grid.settings(getattr(grid, scales) if isinstance(scales, str) else scales, kind))
        return method

    return make


def _restoration(trained: VariationalAutoencoder, grid: Grid) -> VAERestoration:
    method = VAERestoration(trained)
    if steps := grid.restoration_steps:
        # as far in all as by default, in smaller or larger steps
        sizes = [c["step_size"] * c["num_steps"] / steps for c in method.candidates]
        changed = [{"num_steps": steps, "step_size": size} for size in sizes]
        method.choose_among([c | new for c, new in zip(method.candidates, changed, strict=True)])
    return method


# Without dynamic normalisation: clipped to [-1, 1] as DDPM does, or not at all.
CLIPPED = {"thresholding": False, "clip_sample": True}
UNCLIPPED = {"thresholding": False, "clip_sample": False}
# In the order of Table 1, then of Table 2; rivals among the diffusion models clip, as their authors do.
ROWS = {
    "threshold": Row("Thresholding, equalised FLAIR", (1,), None, lambda m, grid: EqualizedThresholding(m)),
    "threshold-median": Row("Threshold of FLAIR / median", (1,), None, lambda m, grid: MedianThresholding(m)),
    "threshold-robust-z": Row("Threshold of FLAIR, robust z", (1,), None, lambda m, grid: RobustZThresholding(m)),
    "threshold-<modality>": Row("Threshold of {}", (1,), None, IntensityThresholding),
    "fanogan": Row("f-AnoGAN", (1,), "fanogan", _itself),
    "vae": Row("VAE, reconstruction", (1,), "vae", _itself),
    "vae-restoration": Row("VAE, restoration", (1,), "vae", _restoration),
    "dae": Row("DAE", (1,), "dae", _itself),
    "cdpm-healthy": Row("CDPM, healthy only", (1, 2), "cdpm-healthy", _counterfactual((0.0,), **CLIPPED)),
    "cdpm-classifier": Row(
        "CDPM + classifier guidance", (1, 2), "cdpm-classifier", _counterfactual("classifier_scales", **CLIPPED)
    ),
    "cdpm-adagn": Row("CDPM with AdaGN, w = 1", (2,), "cdpm-adagn", _counterfactual((1.0,), **CLIPPED)),
    "cdpm-adagn-guided": Row(
        "CDPM with AdaGN, implicit guidance", (2,), "cdpm-adagn", _counterfactual("guidance_scales", **CLIPPED)
    ),
    "ours-clipped": Row(
        "Attention conditioning, static clip", (2,), "ours", _counterfactual("guidance_scales", **CLIPPED)
    ),
    "ours-unclipped": Row(
        "Attention conditioning, no clip", (2,), "ours", _counterfactual("guidance_scales", **UNCLIPPED)
    ),
    "ours": Row("Ours (with dynamic normalisation)", (1, 2), "ours", _counterfactual("guidance_scales")),
    "ours-raw-epsilon": Row(
        "Ours, raw epsilon", (2,), "ours", _counterfactual("guidance_scales", use_clipped_model_output=False)
    ),
    "ours-reconstruction": Row(
        "Ours, reconstruction as reference", (2,), "ours", _counterfactual("guidance_scales", "reconstruction")
    ),
    "ours-fixed-point": Row(
        "Ours, fixed-point inversion",
        (2,),
        "ours",
        _counterfactual("guidance_scales", encoding={"num_fixed_point_iterations": 3}),
    ),
    "forward-map": Row("Forward map of our model", (1,), "ours", _counterfactual("guidance_scales", "forward")),
    "cam": Row("Class activation map", (1,), "cam", _itself),
}
BASELINES = tuple(name for name, row in ROWS.items() if row.network is None)  # what needs no training


def row_of(method: str) -> Row:
    """The row of a method id, `threshold-flair` and the like among them.

    Raises:
        InputError: there is no such method.
    """
    if method in ROWS and "<" not in method:
        return ROWS[method]
    family, _, modality = method.partition("-")
    if family == "threshold" and modality:
        row = ROWS["threshold-<modality>"]
        return Row(
            row.title.format(modality), row.tables, None, lambda names, grid: IntensityThresholding(names, modality)
        )
    raise InputError(f"there is no method {method}; the methods are {', '.join(ROWS)}")


def make_baseline(method: str, modalities: Sequence[str]) -> AnomalyMethod:
    """Returns a method that needs no training, made for images with these modalities.

    Args:
        method: A key of `ROWS`, `<modality>` replaced by the name of one.
        modalities: Names of the channels, in their order.

    Raises:
        InputError: There is no such method, it must be trained first, or the images lack the modality that it needs.
    """
    row = row_of(method)
    if row.network:
        raise InputError(f"method {method} must be trained first: diffusers-cf benchmark --methods {method}")
    return row.make(modalities, None)


def network_of_data(name: str, size: str, num_channels: int, image_size: int, class_names) -> TrainableMethod:
    """A freshly initialised network of `NETWORKS` for a data set.

    Args:
        name: key of `NETWORKS`.
        size: `small` or `paper`.
        num_channels: of the images.
        image_size: side of the network's input in pixels.
        class_names: healthy first; methods that take names get them.
    """
    network = NETWORKS[name]
    arguments = dict(network.small if size == "small" else network.paper)
    if issubclass(network.cls, CounterfactualDiffusion):
        arguments["class_names"] = tuple(class_names)
    return network.cls(num_channels=num_channels, image_size=image_size, **arguments)
