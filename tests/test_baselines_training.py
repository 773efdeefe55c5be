"""Training a method: budgets, the validation curve, resuming, averaged weights, and which slices are used."""

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from training_data import write_training_set

from diffusers_cf.baselines import training
from diffusers_cf.baselines.method import TrainableMethod
from diffusers_cf.baselines.training import Budget, TrainingRecord, set_up_training, slices_of, train_method
from diffusers_cf.data.slices import SliceDataset
from diffusers_cf.errors import InputError


class Line(TrainableMethod):
    """Two scalars, each pulled to a target by its own optimiser."""

    @register_to_config
    def __init__(self, num_channels: int = 2, image_size: int = 8, target: float = 1.0):
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(()))
        self.second = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def optimizers(self):
        return {name: torch.optim.SGD([getattr(self, name)], 0.1) for name in ("first", "second")}

    def losses(self, batch, progress):
        self.seen.append((progress, batch["images"].double().sum().item()))
        yield "first", (self.first - self.config.target) ** 2 + 0 * torch.rand(())
        yield "second", (self.second - self.first.detach()) ** 2

    @torch.no_grad()
    def validation_loss(self, batch):
        return (self.second - self.config.target) ** 2


class Averaged(Line):
    averaged = True


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = write_training_set(tmp_path_factory.mktemp("data") / "set")
    return SliceDataset(folder, "train"), SliceDataset(folder, "validation")


def train(splits, folder, method=None, seed=3):
    """Train, and return the method and its record."""
    method = method or Line()
    run = set_up_training(method, splits[0], folder, Budget(1e6, 24, 4), seed)
    return method, train_method(method, splits[1], run)


def test_a_method_sees_the_slices_it_may_see(splits):
    healthy = slices_of(splits[0], "healthy")
    rows = healthy.__getitems__(list(range(len(healthy))))
    assert {row["label"] for row in rows} == {0} and len(healthy) == len(healthy.labels) == 10
    assert slices_of(splits[0], "all") is splits[0]
    assert healthy.collate(rows)["images"].shape == (10, 2, 16, 16)


def test_the_budget_of_steps(splits, tmp_path):
    method, record = train(splits, tmp_path)
    assert record.steps == 24 and record.images_seen == 96 and len(record.curve) == training.CHECKS
    assert [images for images, _, _ in record.curve] == list(range(8, 97, 8))
    assert [progress for progress, _ in method.seen] == pytest.approx(np.arange(24) / 24)
    assert not method.training


def test_the_learning_rate_follows_the_method(splits, tmp_path):
    method = Line(target=0.0)
    method.learning_rate_factor = lambda progress: 1 - progress
    run = set_up_training(method, splits[0], tmp_path, Budget(1e6, 4, 4), 3)
    rates = [run.optimizers["first"].param_groups[0]["lr"]]
    rates += [run.optimizers["first"].param_groups[0]["lr"] for _ in run.steps()]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])


@pytest.mark.parametrize(
    ("target", "comparable_from", "converged"),
    [(0.0, 0, True), (0.0, 0.75, True), (0.0, 0.8, False), (1.0, 0, False)],  # it begins at 0: nothing gets better
)
def test_a_training_says_whether_it_converged(splits, tmp_path, target, comparable_from, converged):
    method = Line(target=target)
    method.comparable_from = comparable_from
    _, record = train(splits, tmp_path, method)
    assert record.converged is converged and len(record.curve) == training.CHECKS


@pytest.mark.parametrize(
    "losses, flat",
    [
        ([5, 4, 3, 2, 1], False),
        ([5, 5, 5, 4, 4], False),  # no check before the last two was as good
        ([4, 5, 5, 5, 5], True),
        ([4, 5, 5, 3.99, 3.99], True),  # 0.25 % is no gain
        ([4, 5, 5, 5, 3.9], False),
        ([1, 1], False),
    ],
)
def test_when_a_curve_is_flat(losses, flat):
    curve = [[0, 0, loss] for loss in losses]
    assert TrainingRecord(curve=curve).is_flat() is flat
    # the same after six checks of an easier task
    assert TrainingRecord(curve=[[0, 0, 0.1]] * 6 + curve).is_flat(comparable_from=0.5) is flat


@pytest.mark.parametrize("cls", [Line, Averaged])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(splits, tmp_path, monkeypatch, cls):
    monkeypatch.setattr(training, "SECONDS_PER_CHECKPOINT", -1)
    whole, record = train(splits, tmp_path / "whole", cls())
    half = cls()
    half.losses = lambda *given: cls.losses(half, *given) if len(half.seen) < 9 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(splits, tmp_path / "half", half)
    again, resumed = train(splits, tmp_path / "half", cls())
    assert resumed.steps == record.steps
    assert [loss for _, _, loss in resumed.curve] == pytest.approx([loss for _, _, loss in record.curve], rel=1e-6)
    assert again.first.item() == pytest.approx(whole.first.item(), rel=1e-6)
    assert half.seen + again.seen == whole.seen


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_PER_CHECKPOINT", -1)
    train(splits, tmp_path)
    with pytest.raises(InputError, match="made with seed = 3, this run has 4"):
        train(splits, tmp_path, seed=4)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    for path in checkpoint.glob("custom_checkpoint_*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=f"{checkpoint.name}: not a readable checkpoint"):
        train(splits, tmp_path)


def test_averaged_weights_are_those_that_stay(splits, tmp_path):
    plain, _ = train(splits, tmp_path / "a", Line())
    averaged, _ = train(splits, tmp_path / "b", Averaged())
    assert 0 < averaged.first.item() < plain.first.item()  # the average lags behind


def test_broken_weights_end_the_training(splits, tmp_path):
    with pytest.raises(InputError, match="NaN or infinite"):
        train(splits, tmp_path, Line(target=float("nan")))
