"""The noise predictors, which are U-Nets of diffusers, and the class-token encoder tau(c) of Sec. 3.3."""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn


CONDITIONINGS = ("attention", "adagn", "unconditional")

# `attention_levels` counts from the finest level; `class_encoder` holds arguments of ClassTokenEncoder. The finest level
# of `small` has few channels, because at 64 x 64 pixels it takes most of the time on a CPU.
UNET_SIZES = {
    "small": {
        "block_out_channels": (16, 48, 80, 112),
        "layers_per_block": 1,
        "attention_levels": (2, 3),
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "dropout": 0.0,
        "time_embedding_dim": 192,
        "class_encoder": {"num_tokens": 4, "token_dim": 64},
    },
    "paper": {
        "block_out_channels": (64, 128, 192, 256),
        "layers_per_block": 2,
        "attention_levels": (1, 2, 3),
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "dropout": 0.1,
        "time_embedding_dim": 256,
        "class_encoder": {"num_tokens": None, "token_dim": 256},
    },
}

_DOWN_BLOCKS = {"attention": "SimpleCrossAttnDownBlock2D", "adagn": "AttnDownBlock2D"}
_UP_BLOCKS = {"attention": "SimpleCrossAttnUpBlock2D", "adagn": "AttnUpBlock2D"}


def _check_preset(size: str) -> None:
    if size not in UNET_SIZES:
        raise ValueError(f"size is {size!r}: it must be one of {', '.join(UNET_SIZES)}")


def unet_config(
    size: str = "small", conditioning: str = "attention", image_size: int = 64, num_channels: int = 4
) -> dict[str, object]:
    """Return the arguments of `UNet2DConditionModel` for a preset.

    `attention` concatenates the class tokens to keys and values of every attention layer (diffusers' added-KV blocks)
    and adds the class vector to the time embedding (AdaGN). `adagn` has the class vector and plain self-attention (the
    baseline of Sec. 3.3). `unconditional` has neither. `paper` is the authors' network except for the attention heads,
    which are 64 channels wide: diffusers has no option for the authors' single head of full width.

    Args:
        size (`str`): a key of `UNET_SIZES`.
        conditioning (`str`): one of `CONDITIONINGS`.
        image_size (`int`): side of the square image in pixels, a multiple of 8.
        num_channels (`int`): input and output channels.

    Raises:
        ValueError: a name is unknown, or 8 does not divide the side.
    """
    _check_preset(size)
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"conditioning is {conditioning!r}: it must be one of {', '.join(CONDITIONINGS)}")
    if image_size < 8 or image_size % 8:
        raise ValueError(f"image_size is {image_size}: it must be a multiple of 8")
    preset = dict(UNET_SIZES[size])
    attention_levels, class_encoder = preset.pop("attention_levels"), preset.pop("class_encoder")
    kind = "attention" if conditioning == "attention" else "adagn"
    levels = range(len(preset["block_out_channels"]))
    down = tuple(_DOWN_BLOCKS[kind] if i in attention_levels else "ResnetDownsampleBlock2D" for i in levels)
    up = tuple(_UP_BLOCKS[kind] if i in attention_levels else "ResnetUpsampleBlock2D" for i in reversed(levels))
    return preset | {
        "sample_size": image_size,
        "in_channels": num_channels,
        "out_channels": num_channels,
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn" if kind == "attention" else "UNetMidBlock2D",
        "up_block_types": up,
        "resnet_time_scale_shift": "scale_shift",
        "cross_attention_dim": class_encoder["token_dim"],
        "class_embed_type": None if conditioning == "unconditional" else "identity",
    }


def counterfactual_unet(
    size: str = "small", conditioning: str = "attention", image_size: int = 64, num_channels: int = 4
) -> UNet2DConditionModel:
    """Return an untrained noise predictor; arguments and errors as in [`unet_config`].

    The last convolution of each residual block, each attention output and the network's last convolution start at zero,
    as in the authors' code, so that every block starts as the identity.
    """
    unet = UNet2DConditionModel(**unet_config(size, conditioning, image_size, num_channels))
    for name, parameter in unet.named_parameters():
        if ".conv2." in name or ".to_out.0." in name or name.startswith("conv_out."):
            nn.init.zeros_(parameter)
    return unet


class ClassTokenEncoder(ModelMixin, ConfigMixin):
    """tau(c) of Sec. 3.3: turns a class into tokens for the attention layers and a vector for the time embedding.

    The null symbol of implicit guidance (Sec. 3.2) has a row of its own in the tables, after the last class.

    Args:
        class_names (`Sequence[str]`): names of the classes; the first one is the default target of a counterfactual.
        num_tokens (`int`, *optional*): number of learned tokens per class. None is the authors' way: the outer product
            e e^T of the class vector e, read as `token_dim` tokens. The null row of the table is then a frozen zero, and
            its vector comes from the biases of the MLP.
        token_dim (`int`): width of a token, the U-Net's `cross_attention_dim`.
        vector_dim (`int`): width of the vector and of the U-Net's time embedding; `token_dim` for the outer product.
        embedding_dim (`int`): width of the class embedding.

    Raises:
        ValueError: names are too few or not different, or the sizes contradict each other.
    """

    @register_to_config
    def __init__(
        self,
        class_names: Sequence[str] = ("healthy", "unhealthy"),
        num_tokens: int | None = 4,
        token_dim: int = 64,
        vector_dim: int = 192,
        embedding_dim: int = 64,
    ):
        super().__init__()
        if len(class_names) < 2 or len(set(class_names)) < len(class_names):
            raise ValueError(f"class_names is {list(class_names)}: it must hold two or more different names")
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}: it must be 1 or more, or None for the outer product")
        if num_tokens is None and token_dim != vector_dim:
            raise ValueError(f"token_dim {token_dim} must equal vector_dim {vector_dim} for the outer product")
        rows, padding = len(class_names) + 1, len(class_names) if num_tokens is None else None
        self.embedding = nn.Embedding(rows, embedding_dim, padding_idx=padding)
        self.to_vector = nn.Sequential(
            nn.Linear(embedding_dim, vector_dim), nn.SiLU(), nn.Linear(vector_dim, vector_dim)
        )
        self.tokens = nn.Embedding(rows, num_tokens * token_dim) if num_tokens else None

    @property
    def null_id(self) -> int:
        """The row of the null symbol."""
        return len(self.config.class_names)

    def class_id(self, name: str | None) -> int:
        """Return the row of a class, or of the null symbol for None; raise ValueError for an unknown name."""
        if name is None:
            return self.null_id
        if name not in self.config.class_names:
            raise ValueError(f"class {name!r} is unknown: this model knows {', '.join(self.config.class_names)}")
        return list(self.config.class_names).index(name)

    def forward(self, class_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens `(N, num_tokens, token_dim)` and vector `(N, vector_dim)` of class rows `(N,)`."""
        vector = self.to_vector(self.embedding(class_ids))
        if self.tokens is None:
            return vector[:, :, None] * vector[:, None, :], vector
        return self.tokens(class_ids).unflatten(1, (self.config.num_tokens, self.config.token_dim)), vector


def class_token_encoder(size: str = "small", class_names: Sequence[str] = ("healthy", "unhealthy")):
    """Return an untrained [`ClassTokenEncoder`] for [`counterfactual_unet`] of the same `size`."""
    _check_preset(size)
    preset = UNET_SIZES[size]
    return ClassTokenEncoder(
        class_names=tuple(class_names), vector_dim=preset["time_embedding_dim"], **preset["class_encoder"]
    )


def predict_noise(
    unet: UNet2DConditionModel, sample: torch.Tensor, timestep: torch.Tensor, condition: tuple | None
) -> torch.Tensor:
    """Return epsilon_theta(x_t, c, t), the U-Net's output for a condition of [`ClassTokenEncoder`].

    Args:
        unet (`UNet2DConditionModel`): of any of the three conditionings.
        sample (`torch.Tensor`): x_t, `(N, C, H, W)`.
        timestep (`torch.Tensor`): t, scalar or `(N,)`.
        condition (`tuple`, *optional*): tokens and vector; None for an unconditional U-Net.
    """
    tokens, vector = condition if condition is not None else (None, None)
    return unet(sample, timestep, encoder_hidden_states=tokens, class_labels=vector).sample


def implicit_guidance(noise_null: torch.Tensor, noise_target: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Combine both branches by implicit (classifier-free) guidance, Sec. 3.2: `w eps(x, c) + (1 - w) eps(x, null)`.

    w is `guidance_scale` as everywhere in diffusers: 0 is unconditional, 1 conditional, above 1 guided.
    """
    return noise_null + guidance_scale * (noise_target - noise_null)


class ConditionalNoisePredictor(nn.Module):
    """U-Net and class encoder as one module for training.

    Args:
        unet (`UNet2DConditionModel`): the noise predictor.
        class_encoder (`ClassTokenEncoder`, *optional*): None for an unconditional U-Net.
    """

    def __init__(self, unet: UNet2DConditionModel, class_encoder: ClassTokenEncoder | None = None):
        super().__init__()
        self.unet = unet
        self.class_encoder = class_encoder

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """Return epsilon_theta `(N, C, H, W)` of x_t `(N, C, H, W)`, t `(N,)` and class rows `(N,)`."""
        condition = self.class_encoder(class_ids) if self.class_encoder is not None else None
        return predict_noise(self.unet, sample, timestep, condition)


def fastest_layout(device: torch.device, compiled: bool) -> torch.memory_format:
    """Return the memory format of weights in training: channels_last only if compiled for a GPU.

    Otherwise its group normalisation is slow: 0.135 s instead of 0.119 for a step of 512 images on an H200.
    """
    return torch.channels_last if compiled and device.type != "cpu" else torch.contiguous_format
