"""Dynamic normalisation (Sec. 3.4) and the pair of DDIM schedulers (Eq. 2) that apply it while encoding and decoding."""

from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput


def dynamic_normalize(sample: torch.Tensor, ratio: float = 0.99, per_channel: bool = True) -> torch.Tensor:
    """Dynamic normalisation of a predicted clean image: `dn` of Sec. 3.4.

    `th = max(1, quantile(|x0|, s))`, then `dn(x0) = clip(x0, -th, th) / th`. The paper does not give `s` and reads as
    if the quantile were taken per image; its code uses 0.99 per sample and per channel.

    Args:
        sample (`torch.Tensor`): `x0_hat`, shape `(N, C, *)`, any floating dtype. Computed in float32 at least.
        ratio (`float`): the quantile `s`, in (0, 1].
        per_channel (`bool`): one threshold for each sample and channel; False pools the channels of a sample.

    Returns:
        `torch.Tensor`: same shape and dtype, values in [-1, 1].
    """
    working = sample if sample.dtype == torch.float64 else sample.float()
    start = 2 if per_channel else 1
    threshold = absolute_quantile(working.flatten(start), ratio).clamp(min=1)
    threshold = threshold.reshape(threshold.shape + (1,) * (sample.ndim - start))
    return (working.clamp(-threshold, threshold) / threshold).to(sample.dtype)


def absolute_quantile(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """The `ratio`-quantile of |values| over the last axis, interpolated linearly as `torch.quantile` does.

    Selecting the few largest values is several times faster than the sort inside `torch.quantile`, and has no limit
    on the number of values.
    """
    count = values.shape[-1]
    position = ratio * (count - 1)
    lower = int(position)
    largest = values.abs().topk(count - lower, dim=-1).values
    low, high = largest[..., -1], largest[..., max(count - lower - 2, 0)]
    return torch.lerp(low, high, position - lower)


def mirrored_timesteps(num_train_timesteps: int, num_inference_steps: int, spacing: str, offset: int) -> np.ndarray:
    """The rising timesteps tau_0 < tau_1 < .. that encoding walks upwards and decoding downwards.

    Args:
        num_train_timesteps (`int`): T of the training process.
        num_inference_steps (`int`): number of steps n of the full grid; it must divide T.
        spacing (`str`): `leading` (0, T/n, ..) or `trailing` (T/n - 1, 2 T/n - 1, ..).
        offset (`int`): added to a `leading` grid; below the stride T/n.

    Raises:
        ValueError: if the two directions could not walk the same timesteps.
    """
    if num_inference_steps < 1 or num_train_timesteps % num_inference_steps:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps}: encoding and decoding mirror each other only if it is a"
            f" divisor of num_train_timesteps ({num_train_timesteps})"
        )
    stride = num_train_timesteps // num_inference_steps
    if spacing == "trailing":
        offset = stride - 1
    elif spacing != "leading":
        raise ValueError(f"timestep_spacing is {spacing!r}: only 'leading' and 'trailing' have a mirror image")
    if not 0 <= offset < stride:
        raise ValueError(f"steps_offset is {offset}: it must lie in [0, {stride}) for {num_inference_steps} steps")
    return np.arange(num_inference_steps, dtype=np.int64) * stride + offset


class _Step(NamedTuple):
    """What a step of second order remembers of the one before: from where, with what and how far it went, and to where."""

    sample: torch.Tensor
    epsilon: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    is_first: bool
    reached: torch.Tensor | None = None


class _DynamicDDIM:
    """What the two directions share: Eq. 2 with its two noise levels, and the normalisation of its clean image."""

    def _build(self, stock: type) -> None:
        config = self.config
        # The stock __init__ as decorated would register its own defaults over the arguments given here.
        stock.__init__.__wrapped__(
            self,
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            trained_betas=config.trained_betas,
            set_alpha_to_one=config.set_alpha_to_one,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        )
        if not 0 < self.config.dynamic_thresholding_ratio <= 1:
            raise ValueError(
                f"dynamic_thresholding_ratio is {self.config.dynamic_thresholding_ratio}: it must lie in (0, 1]"
            )
        if config.solver_order not in (1, 2):
            raise ValueError(f"solver_order is {config.solver_order}: it must be 1 or 2")
        if config.solver_order == 2 and config.rescale_betas_zero_snr:
            raise ValueError(
                "solver_order is 2: it measures steps by sqrt(1 / abar - 1), infinite at zero terminal SNR"
            )

    def _begin(self, num_inference_steps: int, falling: bool, device: str | torch.device | None) -> None:
        config = self.config
        grid = mirrored_timesteps(
            config.num_train_timesteps, num_inference_steps, config.timestep_spacing, config.steps_offset
        )
        self.timesteps = torch.from_numpy(grid[::-1].copy() if falling else grid).to(device)
        self.num_inference_steps = num_inference_steps
        self._last = None

    def _second_order(self, sample: torch.Tensor, epsilon: torch.Tensor, start: torch.Tensor, end: torch.Tensor):
        """Sample at `start` and epsilon for the step to `end`, from what the step before has seen.

        DDIM is Euler's method for d(x / sqrt(abar)) = epsilon d(rho) with rho = sqrt(1 / abar - 1) (Song et al. 2021,
        Eq. 14). Extrapolated linearly to the middle of the step, epsilon makes it the Adams-Bashforth method of second
        order. The first step, which has nothing to extrapolate from, is walked again with the mean of both ends' epsilon
        once the second one is known; what a caller has made of its result since then is kept. Steps from and to the
        clean image stay of first order: they are far shorter.
        """
        length, last = (1 / end - 1).sqrt() - (1 / start - 1).sqrt(), self._last
        if start == 1 or length == 0:
            return sample, epsilon
        if last and last.is_first:
            again, _ = self._move((last.epsilon + epsilon) / 2, last.sample, last.start, start)
            sample = again + (sample - last.reached)
        self._last = _Step(sample, epsilon, start, length, is_first=last is None)
        if last is None or end == 1:
            return sample, epsilon
        return sample, epsilon + length / (2 * last.length) * (epsilon - last.epsilon)

    def _levels(self, timestep: int, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cumulative alphas `(at timestep, one step nearer to the image)`; `clean` is the one of the image itself."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps first")
        timestep = int(timestep)
        nearer = timestep - self.config.num_train_timesteps // self.num_inference_steps
        return self.alphas_cumprod[timestep], self.alphas_cumprod[nearer] if nearer >= 0 else clean

    def _predict(self, model_output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor, told=None):
        """`(x0_hat, epsilon)` of a sample at level `alpha`, whatever the network predicts.

        A network that was `told` another level than the sample's, as in encoding, has answered for that one: there its
        answer becomes epsilon, and epsilon x0_hat at the sample's own level, as if the network predicted epsilon.
        """
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        epsilon = model_output if told is None else self._predict(model_output, sample, told)[1]
        if self.config.prediction_type == "epsilon" or told is not None:
            return (sample - noise * epsilon) / signal, epsilon
        if self.config.prediction_type == "v_prediction":
            return signal * sample - noise * model_output, signal * model_output + noise * sample
        return model_output, (sample - signal * model_output) / noise

    def _normalize(self, x0: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.thresholding:
            return dynamic_normalize(x0, config.dynamic_thresholding_ratio, config.threshold_per_channel)
        if config.clip_sample:
            return x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x0

    def _normalized(self, x0, epsilon, sample, alpha: torch.Tensor, nearer: torch.Tensor):
        """`(dn(x0_hat), epsilon)` with epsilon re-derived from `dn(x0_hat)`, or raw as Algorithm 1 prints it.

        `alpha` is the level of the sample, `nearer` the step's level that is nearer to the image.
        """
        # In the one step that begins or ends at the clean image no noise can absorb what dn takes from x0: it would
        # cut the peaks of the image itself and darken the rest, and the map would be a threshold in disguise.
        if nearer == 1 and not self.config.threshold_clean_sample:
            return x0, epsilon
        x0 = self._normalize(x0)
        if self.config.use_clipped_model_output and alpha < 1:
            epsilon = (sample - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return x0, epsilon

    def _move(self, epsilon: torch.Tensor, sample: torch.Tensor, start: torch.Tensor, end: torch.Tensor, x0=None):
        """`(x at level end, dn(x0_hat))` from x at level `start`: Eq. 2 with the normalisation of Sec. 3.4."""
        x0 = (sample - (1 - start).sqrt() * epsilon) / start.sqrt() if x0 is None else x0
        x0, epsilon = self._normalized(x0, epsilon, sample, start, torch.maximum(start, end))
        return _to_level(x0, epsilon, end), x0

    def _step(self, model_output: torch.Tensor, sample: torch.Tensor, start, end, return_dict: bool, told=None):
        output, working = _working_precision(model_output, sample)
        x0, epsilon = self._predict(output, working, start, told)
        if self.config.solver_order == 2:
            x0, (working, epsilon) = None, self._second_order(working, epsilon, start, end)
        reached, x0 = (tensor.to(sample.dtype) for tensor in self._move(epsilon, working, start, end, x0))
        if self._last:
            self._last = self._last._replace(reached=reached)
        return DDIMSchedulerOutput(prev_sample=reached, pred_original_sample=x0) if return_dict else (reached, x0)


def _to_level(x0: torch.Tensor, epsilon: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The sample at noise level `alpha`: the second half of Eq. 2."""
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * epsilon


def _working_precision(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


class DynamicDDIMScheduler(_DynamicDDIM, DDIMScheduler, SchedulerMixin):
    """Decoding: deterministic DDIM (Eq. 2) with dynamic normalisation of the predicted clean image (Sec. 3.4).

    Arithmetic is float32 whatever the dtype of the sample. The defaults are the behaviour of the authors' code but for
    the step that ends at the image (`threshold_clean_sample`) and the levels that a step of encoding pairs. Encoding
    counterpart: [`DynamicDDIMInverseScheduler`], made by `DynamicDDIMInverseScheduler.from_config(scheduler.config)`.

    Args:
        num_train_timesteps (`int`): T.
        beta_start (`float`), beta_end (`float`), beta_schedule (`str`), trained_betas: as in `DDIMScheduler`.
        clip_sample (`bool`): static clip to +-`clip_sample_range`; has effect only with `thresholding=False`.
        set_alpha_to_one (`bool`): the image itself has cumulative alpha 1.
        steps_offset (`int`): added to the timesteps of a `leading` grid.
        prediction_type (`str`): `epsilon`, `v_prediction` or `sample`.
        thresholding (`bool`): dynamic normalisation. With this and `clip_sample` False, x0_hat stays as predicted.
        dynamic_thresholding_ratio (`float`): the quantile s of Sec. 3.4, in (0, 1].
        threshold_per_channel (`bool`): quantile per sample and channel; False pools channels.
        threshold_clean_sample (`bool`): normalise also in the step that ends at the clean image, as the authors' code
            does.
        clip_sample_range (`float`): limit of the static clip.
        use_clipped_model_output (`bool`): re-derive epsilon from the normalised x0_hat (the authors' code); False
            keeps the raw epsilon as Algorithm 1 prints it.
        timestep_spacing (`str`): `leading` or `trailing`.
        rescale_betas_zero_snr (`bool`): as in `DDIMScheduler`.
        solver_order (`int`): 1, DDIM as in the paper; 2, Adams-Bashforth of second order at the same cost.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = True,
        dynamic_thresholding_ratio: float = 0.99,
        threshold_per_channel: bool = True,
        threshold_clean_sample: bool = False,
        clip_sample_range: float = 1.0,
        use_clipped_model_output: bool = True,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        solver_order: int = 1,
    ):
        self._build(DDIMScheduler)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the falling grid of timesteps; see [`mirrored_timesteps`] for what is refused."""
        self._begin(num_inference_steps, True, device)

    def step(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple:
        """One step of decoding: from `timestep` to the next one nearer to the image.

        Args:
            model_output (`torch.Tensor`): the (guided) prediction of the network at `timestep`, `(N, C, H, W)`.
            timestep (`int`): current timestep.
            sample (`torch.Tensor`): x at `timestep`, `(N, C, H, W)`.
            return_dict (`bool`): an output with `prev_sample` and `pred_original_sample`, or a tuple of the two.
        """
        alpha, nearer = self._levels(timestep, self.final_alpha_cumprod)
        return self._step(model_output, sample, alpha, nearer, return_dict)


class DynamicDDIMInverseScheduler(_DynamicDDIM, DDIMInverseScheduler, SchedulerMixin):
    """Encoding: the exact reverse of [`DynamicDDIMScheduler`]'s steps, with the same normalisation.

    A step goes from the level one stride nearer to the image up to `timestep`; the network is told `timestep`, the
    noisier end, in both directions (diffusers' pairing). The stock inverse scheduler has no thresholding, clips by
    default and ignores unknown arguments; this one has the arguments of [`DynamicDDIMScheduler`] and refuses others.

    Args:
        num_train_timesteps (`int`), beta_start (`float`), beta_end (`float`), beta_schedule (`str`), trained_betas,
            clip_sample (`bool`), set_alpha_to_one (`bool`), steps_offset (`int`), prediction_type (`str`),
            thresholding (`bool`), dynamic_thresholding_ratio (`float`), threshold_per_channel (`bool`),
            threshold_clean_sample (`bool`), clip_sample_range (`float`), use_clipped_model_output (`bool`),
            timestep_spacing (`str`), rescale_betas_zero_snr (`bool`), solver_order (`int`): as in
            [`DynamicDDIMScheduler`]; the order of one direction does not bind the other.
        num_fixed_point_iterations (`int`): further network calls in each step that [`refine`] uses to make the step
            the exact inverse of decoding.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = True,
        dynamic_thresholding_ratio: float = 0.99,
        threshold_per_channel: bool = True,
        threshold_clean_sample: bool = False,
        clip_sample_range: float = 1.0,
        use_clipped_model_output: bool = True,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        solver_order: int = 1,
        num_fixed_point_iterations: int = 0,
    ):
        self._build(DDIMInverseScheduler)
        if num_fixed_point_iterations < 0:
            raise ValueError(f"num_fixed_point_iterations is {num_fixed_point_iterations}: it must be 0 or more")
        if num_fixed_point_iterations and solver_order != 1:
            raise ValueError("num_fixed_point_iterations refine steps of solver_order=1, not of another order")

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the rising grid of timesteps; see [`mirrored_timesteps`] for what is refused."""
        self._begin(num_inference_steps, False, device)

    def network_timestep(self, timestep: int) -> int:
        """What the network is told in the step that reaches `timestep`.

        With `solver_order=1` it is `timestep`, as in decoding. With 2 it is the level of the sample itself, without
        which no method is of second order; the clean image counts as the first level.
        """
        nearer = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        return nearer if self.config.solver_order == 2 and nearer >= 0 else int(timestep)

    def step(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple:
        """One step of encoding: from one stride nearer to the image up to `timestep`.

        Args:
            model_output (`torch.Tensor`): prediction of the network for `(sample, timestep)`, `(N, C, H, W)`.
            timestep (`int`): the timestep that the step reaches.
            sample (`torch.Tensor`): x one stride nearer to the image, `(N, C, H, W)`.
            return_dict (`bool`): an output with `prev_sample` (x at `timestep`) and `pred_original_sample`, or a tuple.
        """
        alpha, nearer = self._levels(timestep, self.initial_alpha_cumprod)
        told = self.alphas_cumprod[self.network_timestep(timestep)]
        return self._step(model_output, sample, nearer, alpha, return_dict, told)

    def predict_original(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        """`dn(x0_hat)` by this output alone, arguments as in [`step`]; the scheduler stays as it is."""
        output, working = _working_precision(model_output, sample)
        _, nearer = self._levels(timestep, self.initial_alpha_cumprod)
        told = self.alphas_cumprod[self.network_timestep(timestep)]
        return self._normalized(*self._predict(output, working, nearer, told), working, nearer, nearer)[0].to(
            sample.dtype
        )

    def refine(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, estimate: torch.Tensor
    ) -> torch.Tensor:
        """One fixed-point iteration of an encoding step: a better x at `timestep` from the network's word on `estimate`.

        The x sought is the one that a decoding step takes to `sample`; at the fixed point it is exactly that, also
        where normalisation acts (with epsilon re-derived, the default). The iteration contracts while the network's
        output changes little with its input.

        Args:
            model_output (`torch.Tensor`): prediction of the network for `(estimate, timestep)`, `(N, C, H, W)`.
            timestep (`int`): the timestep that the step reaches.
            sample (`torch.Tensor`): x one stride nearer to the image, where the step began.
            estimate (`torch.Tensor`): x at `timestep` so far.
        """
        output, working, current = _working_precision(model_output, sample, estimate)
        alpha, nearer = self._levels(timestep, self.initial_alpha_cumprod)
        _, epsilon = self._normalized(*self._predict(output, current, alpha), current, alpha, nearer)
        x0 = (working - (1 - nearer).sqrt() * epsilon) / nearer.sqrt()
        return _to_level(x0, epsilon, alpha).to(sample.dtype)
