"""Dynamic normalisation (Sec. 3.4) and the pair of DDIM schedulers (Eq. 2) that apply it in encoding and decoding."""

import inspect
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput


# Options that training, encoding and decoding share: the noise levels, and what the network predicts.
NOISE_LEVELS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
# Options that apply only to a static clip or to dynamic normalisation, and the values that stock schedulers imply.
_CLIPPING = ("clip_sample_range", "threshold_clean_sample", "use_clipped_model_output")
_THRESHOLDING = ("dynamic_thresholding_ratio", "threshold_per_channel", "sample_max_value", *_CLIPPING[1:])
_STOCK = {"threshold_per_channel": False, "threshold_clean_sample": True, "use_clipped_model_output": False}


def dynamic_normalize(sample: torch.Tensor, ratio: float = 0.99, per_channel: bool = True) -> torch.Tensor:
    """Apply `dn` of Sec. 3.4 to a predicted clean image: `dn(x0) = clip(x0, -th, th) / th`.

    The threshold is `th = max(1, quantile(|x0|, s))`. The paper does not give s and suggests a quantile per image; its
    code uses 0.99 per sample and channel.

    Args:
        sample (`torch.Tensor`): x0, `(N, C, *)`, any floating dtype; computed in at least float32.
        ratio (`float`): the quantile s, in (0, 1].
        per_channel (`bool`): one threshold for each sample and channel; False pools the channels of a sample.

    Returns:
        `torch.Tensor`: same shape and dtype, values in [-1, 1].
    """
    (working,) = _at_least_float32(sample)
    start = 2 if per_channel else 1
    magnitudes = working.flatten(start).abs()
    # torch.quantile, but several times faster: the few largest values are selected instead of sorting all of them
    position = ratio * (magnitudes.shape[-1] - 1)
    lower = int(position)
    largest = magnitudes.topk(magnitudes.shape[-1] - lower, dim=-1).values
    low, high = largest[..., -1], largest[..., max(largest.shape[-1] - 2, 0)]
    threshold = torch.lerp(low, high, position - lower).clamp(min=1)
    threshold = threshold.reshape(threshold.shape + (1,) * (sample.ndim - start))
    return (working.clamp(-threshold, threshold) / threshold).to(sample.dtype)


def _at_least_float32(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


class _DynamicDDIM:
    """The common part of both directions: Eq. 2 between two noise levels, and the normalisation of its clean image.

    Symbols of the paper and names in the code: x_t `sample`, epsilon_theta(x_t, t) `model_output`, the cumulative
    product abar_t `alpha`, its value one step nearer to the image `alpha_nearer`, dn(x0_hat) `x0`.
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
        image_at_first_timestep: bool = False,
    ):
        # The stock __init__ without its decorator, which would register its defaults over the arguments given here.
        self._stock.__init__.__wrapped__(
            self, num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end,
            beta_schedule=beta_schedule, trained_betas=trained_betas, set_alpha_to_one=set_alpha_to_one,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )  # fmt: skip
        if not 0 < dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio is {dynamic_thresholding_ratio}: it must lie in (0, 1]")
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order is {solver_order}: it must be 1 or 2")
        if solver_order == 2 and rescale_betas_zero_snr:
            raise ValueError("solver_order is 2: steps in sqrt(1 / abar - 1) are infinite at zero terminal SNR")
        if num_fixed_point_iterations < 0:
            raise ValueError(f"num_fixed_point_iterations is {num_fixed_point_iterations}: it must be 0 or more")
        if num_fixed_point_iterations and solver_order != 1:
            raise ValueError("num_fixed_point_iterations refine steps of solver_order=1, not of another order")
        if image_at_first_timestep:
            if solver_order != 1 or num_fixed_point_iterations:
                raise ValueError("image_at_first_timestep needs solver_order=1 and num_fixed_point_iterations=0")
            self.alphas_cumprod = (1 - self.betas.double()).cumprod(0)  # in float32, 1 - 0.9999 has three digits

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set `timesteps`, what the network is given in each step, and `grid`, the same levels ascending.

        The grid is 0, T/n, .. plus `steps_offset` for `leading`, and T/n - 1, 2 T/n - 1, .. for `trailing`.

        Args:
            num_inference_steps (`int`): number of steps n of the full grid, a divisor of T.
            device (`str` or `torch.device`, *optional*): where to put the timesteps.

        Raises:
            ValueError: encoding and decoding can't take the same steps.
        """
        config, train_steps = self.config, self.config.num_train_timesteps
        if num_inference_steps < 1 or train_steps % num_inference_steps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}: it must divide num_train_timesteps ({train_steps})"
            )
        stride = train_steps // num_inference_steps
        if config.timestep_spacing not in ("leading", "trailing"):
            spacing = config.timestep_spacing
            raise ValueError(f"timestep_spacing is {spacing!r}: only 'leading' and 'trailing' have a mirror image")
        offset = config.steps_offset if config.timestep_spacing == "leading" else stride - 1
        if not 0 <= offset < stride:
            raise ValueError(f"steps_offset is {offset}: it must lie in [0, {stride}) for {num_inference_steps} steps")
        self.grid, self.num_inference_steps = torch.arange(num_inference_steps) * stride + offset, num_inference_steps
        self._last, self._evaluations = None, 0
        self.timesteps = self._timesteps().to(device)

    def step(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple:
        """Take the step of a timestep by Eq. 2.

        Args:
            model_output (`torch.Tensor`): (guided) prediction of the network for `(sample, timestep)`, `(N, C, H, W)`.
            timestep (`int`): the next entry of `timesteps`.
            sample (`torch.Tensor`): x where the step begins, `(N, C, H, W)`; the x that was reached, where encoding
                repeats a timestep to refine the step before.
            return_dict (`bool`): return an output with `prev_sample` and `pred_original_sample`, or a tuple of both.
        """
        working = _at_least_float32(model_output, sample)
        reached, x0 = (tensor.to(sample.dtype) for tensor in self._take_step(*working, timestep))
        if self._last:
            self._last.reached = reached
        return DDIMSchedulerOutput(prev_sample=reached, pred_original_sample=x0) if return_dict else (reached, x0)

    def _second_order(self, sample: torch.Tensor, epsilon: torch.Tensor, start: torch.Tensor, end: torch.Tensor):
        """Return the sample at `start`, and the epsilon of the step to `end` extrapolated from the step before.

        DDIM is Euler's method for d(x / sqrt(abar)) = epsilon d(rho) with rho = sqrt(1 / abar - 1) (Song et al. 2021,
        Eq. 14). Extrapolating epsilon linearly to the middle of the step makes it the Adams-Bashforth method of second
        order. The first step has no step before it. Once the epsilon at its end is known, it is repeated with the mean
        of both, and changes by a callback since then are kept. Steps from and to the clean image stay of first order,
        because they are far shorter.
        """
        length, last = (1 / end - 1).sqrt() - (1 / start - 1).sqrt(), self._last
        if start == 1 or length == 0:
            return sample, epsilon
        if last and last.is_first:
            again, _ = self._move((last.epsilon + epsilon) / 2, last.sample, last.start, start)
            sample = again + (sample - last.reached)
        # `step` adds `reached`, the sample at the end of the step
        self._last = SimpleNamespace(sample=sample, epsilon=epsilon, start=start, length=length, is_first=last is None)
        if last is None or end == 1:
            return sample, epsilon
        return sample, epsilon + length / (2 * last.length) * (epsilon - last.epsilon)

    def _levels(self, timestep: int, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return abar at a timestep and one step nearer to the image, where `clean` is that of the image itself."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps first")
        nearer = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        beyond = timestep >= self.config.num_train_timesteps  # the authors' last step of all ends in pure noise
        alpha = torch.zeros_like(clean) if beyond else self.alphas_cumprod[int(timestep)]
        return alpha, self.alphas_cumprod[nearer] if nearer >= 0 else clean

    def _predict(self, model_output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor, model_alpha=None):
        """Return `(x0_hat, epsilon)` of a sample at level `alpha` for each `prediction_type`.

        In encoding the network may be given a level `model_alpha` that is not the sample's own. The output is then
        converted to epsilon at that level, and epsilon to x0_hat at the sample's level.
        """
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        epsilon = model_output if model_alpha is None else self._predict(model_output, sample, model_alpha)[1]
        if self.config.prediction_type == "epsilon" or model_alpha is not None:
            return (sample - noise * epsilon) / signal, epsilon
        if self.config.prediction_type == "v_prediction":
            return signal * sample - noise * model_output, signal * model_output + noise * sample
        return model_output, (sample - signal * model_output) / noise

    def _normalized(self, x0, epsilon, sample, alpha: torch.Tensor, alpha_nearer: torch.Tensor):
        """Return `(dn(x0_hat), epsilon)`, with epsilon derived from `dn(x0_hat)` or raw as Algorithm 1 prints it."""
        config = self.config
        # The step that begins or ends at the clean image has no noise to absorb what dn removes from x0. Normalising
        # there would cut the peaks of the image itself, and the heatmap would be an intensity threshold in disguise.
        if alpha_nearer == 1 and not config.threshold_clean_sample:
            return x0, epsilon
        if config.thresholding:
            x0 = dynamic_normalize(x0, config.dynamic_thresholding_ratio, config.threshold_per_channel)
        elif config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        if config.use_clipped_model_output and alpha < 1:
            epsilon = (sample - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return x0, epsilon

    def _move(self, epsilon: torch.Tensor, sample: torch.Tensor, start: torch.Tensor, end: torch.Tensor, x0=None):
        """Return `(x at level end, dn(x0_hat))` from x at level `start`: Eq. 2 with the normalisation of Sec. 3.4."""
        x0 = (sample - (1 - start).sqrt() * epsilon) / start.sqrt() if x0 is None else x0
        x0, epsilon = self._normalized(x0, epsilon, sample, start, torch.maximum(start, end))
        return end.sqrt() * x0 + (1 - end).sqrt() * epsilon, x0

    def _solve(self, model_output: torch.Tensor, sample: torch.Tensor, start, end, model_alpha=None):
        """Return `(x at level end, dn(x0_hat))` from x at level `start` and what the network says of it."""
        x0, epsilon = self._predict(model_output, sample, start, model_alpha)
        if self.config.solver_order == 2:
            x0, (sample, epsilon) = None, self._second_order(sample, epsilon, start, end)
        return self._move(epsilon, sample, start, end, x0)


class DynamicDDIMScheduler(_DynamicDDIM, DDIMScheduler, SchedulerMixin):
    """Decoding: deterministic DDIM (Eq. 2) with dynamic normalisation of the predicted clean image (Sec. 3.4).

    It computes in at least float32, whatever the dtype of the sample. The defaults follow the authors' code, except
    for `threshold_clean_sample` and for the levels between which encoding steps. Make the scheduler for encoding with
    `DynamicDDIMInverseScheduler.from_config(scheduler.config)`.

    Args:
        num_train_timesteps (`int`): T.
        beta_start (`float`): as in `DDIMScheduler`, and the next three.
        beta_end (`float`): the last beta.
        beta_schedule (`str`): how betas rise between them.
        trained_betas (`np.ndarray`, *optional*): betas to use instead.
        clip_sample (`bool`): clip x0_hat at +-`clip_sample_range`; only with `thresholding=False`.
        set_alpha_to_one (`bool`): the image itself has cumulative alpha 1.
        steps_offset (`int`): added to the timesteps of a `leading` grid.
        prediction_type (`str`): `epsilon`, `v_prediction` or `sample`.
        thresholding (`bool`): apply dynamic normalisation. If it and `clip_sample` are False, x0_hat is used as it is.
        dynamic_thresholding_ratio (`float`): the quantile s of Sec. 3.4, in (0, 1].
        threshold_per_channel (`bool`): take the quantile per sample and channel; False pools the channels.
        threshold_clean_sample (`bool`): also normalise in the step that begins or ends at the clean image.
        clip_sample_range (`float`): limit of the static clip.
        use_clipped_model_output (`bool`): derive epsilon from the normalised x0_hat, as the authors' code does; False
            keeps the raw epsilon, as Algorithm 1 prints it.
        timestep_spacing (`str`): `leading` or `trailing`.
        rescale_betas_zero_snr (`bool`): as in `DDIMScheduler`.
        solver_order (`int`): 1 is DDIM as in the paper; 2 is Adams-Bashforth of second order at the same cost.
        num_fixed_point_iterations (`int`): used in encoding only, see [`DynamicDDIMInverseScheduler`].
        image_at_first_timestep (`bool`): used in encoding only, see [`DynamicDDIMInverseScheduler`].
    """

    _stock = DDIMScheduler

    def _timesteps(self) -> torch.Tensor:
        return self.grid.flip(0)

    def _take_step(self, model_output: torch.Tensor, sample: torch.Tensor, timestep: int) -> tuple:
        return self._solve(model_output, sample, *self._levels(timestep, self.final_alpha_cumprod))

    def predict_original(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        """Return `dn(x0_hat)` of a sample at its timestep's noise level, without taking a step."""
        output, working = _at_least_float32(model_output, sample)
        alpha, _ = self._levels(timestep, self.final_alpha_cumprod)
        return self._normalized(*self._predict(output, working, alpha), working, alpha, alpha)[0].to(sample.dtype)


class DynamicDDIMInverseScheduler(_DynamicDDIM, DDIMInverseScheduler, SchedulerMixin):
    """Encoding: takes the steps of [`DynamicDDIMScheduler`] upwards, with the same normalisation.

    With `solver_order=1` a step ends at its timestep: the network is given the noisier end, as in decoding and in
    diffusers. With 2 it begins there, since a method of second order needs the sample's own level; the clean image
    counts as the first level. The loop is `step(predict(x, t), t, x)` in all cases.

    The arguments are those of [`DynamicDDIMScheduler`]. The stock inverse scheduler has no thresholding, clips by
    default and ignores unknown arguments.

    Args:
        num_fixed_point_iterations (`int`): further network calls in each step, for `solver_order=1` only. Each repeats
            the timestep with the x that was reached, and moves it towards the x that decoding takes back to where the
            step began. The iteration contracts if the network's output changes little with its input.
        image_at_first_timestep (`bool`): as in the authors' code, the image counts as the sample at the first timestep,
            and each step goes from its timestep, of which the network is told, to the next one. Decoding then begins
            one level below the one where encoding has ended. See [`authors_schedulers`].
    """

    _stock = DDIMInverseScheduler

    @property
    def order(self) -> int:
        """Number of function evaluations (NFE) of a step; each is an entry of `timesteps`."""
        return 1 + self.config.num_fixed_point_iterations

    def _timesteps(self) -> torch.Tensor:
        shifted = torch.cat([self.grid[:1], self.grid[:-1]]) if self.config.solver_order == 2 else self.grid
        return shifted.repeat_interleave(self.order)

    def _levels_of_step(self, timestep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return abar at the end of the step, at its start, and of the level that the network was given."""
        stride = self.config.num_train_timesteps // (self.num_inference_steps or 1)
        # of second order, the first of two equal timesteps begins at the clean image, all others at their own level
        later = self.config.solver_order == 2 and (self._evaluations or timestep > self.grid[0])
        ahead = stride if later or self.config.image_at_first_timestep else 0
        alpha, alpha_nearer = self._levels(int(timestep) + ahead, self.initial_alpha_cumprod)
        return alpha, alpha_nearer, self.alphas_cumprod[int(timestep)]

    def _take_step(self, model_output: torch.Tensor, sample: torch.Tensor, timestep: int) -> tuple:
        alpha, alpha_nearer, model_alpha = self._levels_of_step(timestep)
        begins, self._evaluations = self._evaluations % self.order == 0, self._evaluations + 1
        if begins:
            self._origin = sample
            return self._solve(model_output, sample, alpha_nearer, alpha, model_alpha)
        # Decoding from the current x has this epsilon. The x that it takes to the origin is a better one.
        predicted = self._predict(model_output, sample, alpha)
        _, epsilon = self._normalized(*predicted, sample, alpha, alpha_nearer)
        x0 = (self._origin - (1 - alpha_nearer).sqrt() * epsilon) / alpha_nearer.sqrt()
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * epsilon, x0

    def predict_original(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        """Return `dn(x0_hat)` for the arguments of the next [`step`], without taking it."""
        output, working = _at_least_float32(model_output, sample)
        _, alpha, model_alpha = self._levels_of_step(timestep)
        predicted = self._predict(output, working, alpha, model_alpha)
        return self._normalized(*predicted, working, alpha, alpha)[0].to(sample.dtype)


def authors_schedulers(config) -> tuple[DynamicDDIMScheduler, DynamicDDIMInverseScheduler]:
    """Return schedulers that take the steps of the authors' code (Diff-SCM) with the noise levels of a config.

    They treat the image as the sample at the first timestep, give the network the timestep of the level where a step
    begins, normalise in every step, and start decoding one level below the end of encoding.
    """
    options = {"threshold_clean_sample": True, "image_at_first_timestep": True, "solver_order": 1}
    options |= {"num_fixed_point_iterations": 0, "thresholding": True, "use_clipped_model_output": True}
    scheduler = DynamicDDIMScheduler.from_config(config, **options)
    return scheduler, DynamicDDIMInverseScheduler.from_config(scheduler.config)


def check_mirrored(scheduler: SchedulerMixin, inverse_scheduler: SchedulerMixin) -> None:
    """Raise ValueError unless two schedulers, with their timesteps set, take the same steps in opposite directions.

    Args:
        scheduler ([`SchedulerMixin`]): decodes; ours or a stock one.
        inverse_scheduler ([`SchedulerMixin`]): encodes; ours or the stock `DDIMInverseScheduler`.
    """
    if not isinstance(inverse_scheduler, DDIMInverseScheduler):
        name = type(inverse_scheduler).__name__
        raise ValueError(f"inverse_scheduler is a {name}: only steps of a DDIMInverseScheduler end at their timestep")
    down, up = scheduler.config, inverse_scheduler.config
    shared = (*NOISE_LEVELS, "set_alpha_to_one")
    differing = [name for name in shared if name in down and name in up and down[name] != up[name]]
    grid = getattr(inverse_scheduler, "grid", inverse_scheduler.timesteps)
    if not torch.equal(grid.flip(0), scheduler.timesteps):
        differing.append("timesteps")
    down, up = _normalization(scheduler), _normalization(inverse_scheduler)
    differing += [name for name in {**down, **up} if down.get(name) != up.get(name)]
    if differing:
        names, advice = ", ".join(differing), "make one from_config of the other"
        if type(scheduler) is DDIMScheduler or type(inverse_scheduler) is DDIMInverseScheduler:
            options = "thresholding=False, clip_sample=False"
            advice = f"stock schedulers need DDIMScheduler.from_config(config, {options}) and its inverse"
        raise ValueError(f"scheduler and inverse_scheduler differ in {names}: {advice}")


def _normalization(scheduler: SchedulerMixin) -> dict[str, object]:
    """Return the options of clipping or normalisation that are in effect."""
    # `from_config` keeps options in the config that the class ignores
    known = inspect.signature(type(scheduler).__init__).parameters
    options = _STOCK | {name: value for name, value in scheduler.config.items() if name in known}
    if options.get("thresholding"):
        names = ("thresholding", *_THRESHOLDING)
    else:
        names = ("clip_sample", *_CLIPPING) if options.get("clip_sample") else ()
    return {name: options.get(name) for name in names}
