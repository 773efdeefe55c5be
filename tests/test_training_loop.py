"""The training loop: order of the optimisers, accumulation, averaged weights, limits, reports."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from training_data import forget_accelerator, two_slices

from diffusers_cf.errors import InputError
from diffusers_cf.losses import noise_prediction_loss
from diffusers_cf.training import loop
from diffusers_cf.training.batches import TrainingSlices
from diffusers_cf.training.curves import read_curve
from diffusers_cf.training.loop import Training


class Line(torch.nn.Module):
    """Two scalars, each pulled to a target by its own optimiser."""

    def __init__(self, target=0.4):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
        self.target, self.seen = target, []

    def losses(self, batch, progress):
        self.seen.append((progress, batch["images"].sum().item()))
        yield "first", (self.first - self.target) ** 2
        yield "second", (self.second - self.first) ** 2


def training_of(line, folder="unused", parts=1, share=0.0, **options):
    forget_accelerator()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    weights = {"first": line.first, "second": line.second}
    optimizers = {name: accelerator.prepare(torch.optim.SGD([weight], 0.1)) for name, weight in weights.items()}
    slices = TrainingSlices(two_slices(), 0, (32, 32), crop_background=share, halvings=3)
    given = {"metadata": {"seed": 0}, "batch_size": 4, "max_steps": 6, "num_workers": 0} | options
    accelerator.register_for_checkpointing(line)
    return Training(accelerator, line, line.losses, optimizers, slices, folder, **given)


def test_each_loss_steps_its_own_optimiser_before_the_next_is_computed():
    line = Line(target=0.4)
    total = training_of(line).accumulate([{"images": torch.zeros(1)}])
    # first: 0 - 0.1 * 2 (0 - 0.4) = 0.08; second is then pulled towards 0.08: 0 - 0.1 * 2 (0 - 0.08) = 0.016
    assert line.first.item() == pytest.approx(0.08) and line.second.item() == pytest.approx(0.016)
    assert total.item() == pytest.approx(0.16 + 0.0064)
    assert line.first.grad is None and line.second.grad is None  # the second loss has a gradient for the first weight


@pytest.mark.parametrize(("max_norm", "step"), [(1.0, 0.1), (None, 200.0)])
def test_gradients_are_clipped(max_norm, step):
    line = Line(target=1000.0)
    training_of(line, max_grad_norm=max_norm).accumulate([{"images": torch.zeros(1)}])
    assert line.first.item() == pytest.approx(step)


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_covers_losses_and_not_their_backward_passes(autocast, monkeypatch):
    events, training = [], training_of(Line(), autocast=autocast)
    backward = training.accelerator.backward

    @contextmanager
    def recorded():
        events.append("begin")
        yield
        events.append("end")

    monkeypatch.setattr(training.accelerator, "autocast", recorded)
    monkeypatch.setattr(training.accelerator, "backward", lambda loss: events.append("backward") or backward(loss))
    training.accumulate([{"images": torch.zeros(1)}])
    cast = ["begin", "end"] * autocast
    assert events == 2 * [*cast, "backward"] + cast  # two losses, and the end


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_each_image_weighs_the_same_wherever_it_is_cut(share):
    network, scheduler, calls = Line(), DDPMScheduler(), []
    network.first.data.fill_(1)

    def scaled(sample, timesteps, class_ids):
        calls.append(len(sample))
        return network.first * sample

    def loss_of(part):
        given = (part[key] for key in ("images", "labels", "noise", "timesteps"))
        return noise_prediction_loss(scaled, scheduler, *given, 5.0)

    slices = TrainingSlices(two_slices(), 0, (32, 32), crop_background=share)
    parts = slices.collate_parts(slices.__getitems__(list(range(10))))
    assert len(parts) == (2 if share else 1)
    singles = [{k: v[i : i + 1] for k, v in part.items()} for part in parts for i in range(len(part["labels"]))]
    expected = torch.stack([loss_of(single) for single in singles]).mean()
    (gradient,) = torch.autograd.grad(expected, network.first)
    calls.clear()
    given = {"metadata": {}, "batch_size": 10, "max_steps": 1, "max_grad_norm": None}
    optimizers = {"network": torch.optim.SGD([network.first], 0.5)}

    def losses(part, progress):
        yield "network", loss_of(part)

    loss = Training(Accelerator(cpu=True), network, losses, optimizers, slices, None, **given).accumulate(parts)
    assert len(calls) == len(parts)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(network.first.detach(), 1 - 0.5 * gradient)


def test_training_ends_at_the_limit_of_seconds_without_the_callers_time(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def tick():
        clock.now += 0.5
        return clock.now

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=tick))
    training = training_of(Line(), max_steps=1000, max_seconds=3.0)
    for _ in training.steps():
        clock.now += 100  # validation and checkpoints
    assert (training.step, training.seconds, training.progress) == (6, 3.0, 1.0)
    assert list(training.steps()) == []


def test_a_report_averages_over_parts_and_steps_and_stops_at_nan(tmp_path):
    training = training_of(Line(), tmp_path, parts=2, batch_size=4)
    losses = iter([1.0, 2.0, 3.0, 6.0, 8.0, 10.0, float("nan"), 1.0])
    training.losses = lambda batch, progress: iter([("first", 0 * training.model.first + next(losses))])
    steps = training.steps()
    next(steps), next(steps)
    training.seconds = 4.0
    assert training.report() == {"loss": 3.0, "lr": 0.1, "images_per_second": 4.0}
    next(steps)
    training.seconds = 5.0
    assert training.report() == {"loss": 9.0, "lr": 0.1, "images_per_second": 8.0}
    next(steps)
    with pytest.raises(InputError, match="^the loss became nan between steps 3 and 4: lower --learning_rate"):
        training.report()
    rows = [(row["step"], row["images"], row["loss"]) for row in read_curve(tmp_path / "losses.json")]
    assert rows == [(2, 16, 3.0), (3, 24, 9.0)]


def test_averaged_weights_come_and_go_even_after_an_error():
    line = Line().train()
    training = training_of(line, ema=EMAModel(line.parameters()))
    with torch.no_grad():
        line.first.fill_(7)
    with pytest.raises(KeyError), training.averaged() as averaged:
        assert averaged is line and not line.training and line.first == 0
        raise KeyError
    assert line.training and line.first == 7


def test_a_resumed_training_goes_on_as_if_never_stopped(tmp_path):
    whole, half, rest = Line(), Line(), Line()
    list(training_of(whole).steps())
    first = training_of(half, tmp_path)
    for step in first.steps():
        if step == 4:
            first.save(curve=[1, 2])
            break
    second = training_of(rest, tmp_path)
    assert second.resume("latest")["curve"] == [1, 2]
    assert (second.step, second.seconds) == (4, first.seconds)
    assert list(second.steps()) == [5, 6]
    assert half.seen + rest.seen == whole.seen and rest.second.item() == whole.second.item()
