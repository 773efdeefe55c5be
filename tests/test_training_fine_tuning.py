"""What fine-tuning keeps of its base model, and the precision of training."""

from unittest.mock import Mock

import pytest
import torch
from model_files import tiny_pipeline
from training_data import forget_accelerator, options, write_training_set

import train_counterfactual
from diffusers_cf import CounterfactualDDIMPipeline, DynamicDDIMInverseScheduler, DynamicDDIMScheduler, InputError
from diffusers_cf.losses import noise_prediction_loss
from diffusers_cf.training.fine_tuning import keep_channels
from train_counterfactual import main, parse_args, start_accelerator


SETTINGS = {"guidance_scale": 6.0, "strength": 0.5, "num_inference_steps": 10, "threshold": 0.07}


@pytest.fixture(autouse=True)
def _new_accelerator():
    forget_accelerator()
    yield
    forget_accelerator()


def save_base(folder, **facts):
    """Save a pipeline to fine-tune, with these entries in its preprocessing.json, and return it."""
    pipe = tiny_pipeline()
    pipe.preprocessing = facts
    pipe.save_pretrained(folder / "base")
    return pipe


def fine_tuned(folder, modalities=("flair", "t1"), data=None, **changes):
    """Fine-tune `base` for one step and return the pipeline."""
    if not (folder / "data").exists():
        write_training_set(folder / "data", channels=len(modalities), modalities=list(modalities), **data or {})
    changes = {"pretrained_model": folder / "base", "max_train_steps": 1, "resolution": None} | changes
    main(parse_args(options(folder / "data", folder / "tuned", **changes)))
    return CounterfactualDDIMPipeline.from_pretrained(folder / "tuned")


def test_schedulers_and_settings_are_kept_but_no_threshold(tmp_path):
    pipe = tiny_pipeline()
    inverse = DynamicDDIMInverseScheduler.from_config(pipe.inverse_scheduler.config, solver_order=2)
    base = CounterfactualDDIMPipeline(pipe.unet, pipe.class_encoder, pipe.scheduler, inverse, clip_input=False)
    base.preprocessing = {"settings": SETTINGS, "signs": [1, -1], "paper_threshold": 0.1}
    base.save_pretrained(tmp_path / "base")
    tuned = fine_tuned(tmp_path)
    assert tuned.inverse_scheduler.config.solver_order == 2 and tuned.config.clip_input is False
    facts = tuned.preprocessing
    assert facts["settings"] == {k: v for k, v in SETTINGS.items() if k != "threshold"} and facts["signs"] == [1, -1]
    assert "paper_threshold" not in facts and facts["training"]["base_model"] == "base"
    assert "--no_clip_input" in facts["training"]["command"]


def test_training_uses_the_noise_levels_of_the_pipeline(tmp_path, monkeypatch):
    pipe, loss = tiny_pipeline(), Mock(wraps=noise_prediction_loss)
    scheduler = DynamicDDIMScheduler(beta_end=0.04, trained_betas=None)
    inverse = DynamicDDIMInverseScheduler.from_config(scheduler.config)
    CounterfactualDDIMPipeline(pipe.unet, pipe.class_encoder, scheduler, inverse).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(train_counterfactual, "noise_prediction_loss", loss)
    tuned = fine_tuned(tmp_path)
    for used in (loss.call_args.args[1], tuned.scheduler):
        assert torch.equal(used.alphas_cumprod, scheduler.alphas_cumprod)


def test_max_train_samples_is_recorded_and_what_the_base_does_not_recommend_is_not(tmp_path):
    save_base(tmp_path)
    facts = fine_tuned(tmp_path, max_train_samples=7).preprocessing
    assert (facts["training"]["slices"], facts["training"]["patients"]) == (7, 1)
    assert "settings" not in facts and "signs" not in facts and facts["modalities"] == ["flair", "t1"]


@pytest.mark.parametrize("channels", [[2], [3, 0], [2, 1, 0, 3]])
def test_keeping_channels_equals_the_whole_network_with_zero_weights_for_the_others(channels):
    unet, encoder = tiny_pipeline(channels=4).unet, tiny_pipeline().class_encoder
    with torch.no_grad():
        unet.conv_in.weight[:, [c for c in range(4) if c not in channels]] = 0
    tokens, vector = encoder(torch.tensor([1, 0]))
    given = {"timestep": torch.tensor([3, 700]), "encoder_hidden_states": tokens, "class_labels": vector}
    images = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = keep_channels(unet, channels)
    assert kept.config.in_channels == kept.config.out_channels == len(channels)
    with torch.no_grad():
        whole, part = unet(images, **given).sample, kept(images[:, channels], **given).sample
    torch.testing.assert_close(part, whole[:, channels])


@pytest.mark.parametrize("modalities", [["t1"], ["t1", "flair"]])
def test_fine_tuning_takes_the_modalities_of_the_data_set(modalities, tmp_path):
    pipe = save_base(tmp_path, modalities=["flair", "t1"], signs=[1, -1])
    tuned = fine_tuned(tmp_path, modalities, learning_rate=0)
    channels = [["flair", "t1"].index(name) for name in modalities]
    assert tuned.preprocessing["modalities"] == modalities
    assert tuned.preprocessing["signs"] == [[1, -1][channel] for channel in channels]
    torch.testing.assert_close(tuned.unet.conv_in.weight, pipe.unet.conv_in.weight[:, channels])
    torch.testing.assert_close(tuned.unet.conv_out.weight, pipe.unet.conv_out.weight[channels])


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"modalities": []}, "base: takes 2 channels, {data} has 3"),
        ({"modalities": ["flair", "t2"]}, "base: takes flair, t2, {data} has t1 as well"),
        ({"modalities": ["flair"]}, "base: takes 2 channels, but names the modalities flair"),
        ({"modalities": ["t1", "flair"], "signs": [1]}, "no `signs`, one for each channel"),
    ],
)
def test_a_base_whose_modalities_do_not_fit_is_refused(facts, words, tmp_path):
    save_base(tmp_path, **facts)
    with pytest.raises(InputError) as caught:
        fine_tuned(tmp_path, ("flair", "t1") if facts["modalities"] else ("flair", "t1", "t2"))
    assert words.format(data=tmp_path / "data") in str(caught.value)


@pytest.mark.parametrize("computes", [True, False])
@pytest.mark.parametrize("wanted", ["auto", "bf16"])
def test_auto_precision_is_bf16_where_the_processor_computes_in_it(monkeypatch, caplog, tmp_path, computes, wanted):
    monkeypatch.setattr(train_counterfactual, "computes_in_bfloat16", lambda device: computes)
    args = parse_args(["--dataset=DATASET", f"--output_dir={tmp_path}", f"--mixed_precision={wanted}"])
    assert start_accelerator(args, tmp_path).mixed_precision == ("bf16" if computes or wanted == "bf16" else "no")
    assert ("bf16 is emulated" in caplog.text) == (wanted == "bf16" and not computes)


def test_another_intensity_scale_needs_renormalize(tmp_path):
    save_base(tmp_path, normalize="p99", settings=SETTINGS)
    data = {"percentile": None, "normalize": "median"}
    with pytest.raises(InputError, match="base: takes images of the intensity scale p99, .*data has median"):
        fine_tuned(tmp_path, data=data)
    assert fine_tuned(tmp_path, renormalize=True).preprocessing["normalize"] == "median"
