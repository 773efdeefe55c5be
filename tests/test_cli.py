"""The command line: exit codes, spelling of options, and that bad input ends in one line."""

import argparse
import json

import pytest
import torch

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.cli import COMMANDS, main
from diffusers_cf.errors import InputError
from diffusers_cf.files import make_folder
from diffusers_cf.inference import check_device_arguments, open_pipeline
from diffusers_cf.loading import PRETRAINED
from diffusers_cf.provenance import package_commit


def test_options_may_be_written_with_either_dash():
    parser = ArgumentParser()
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--name")
    for arguments in (["--batch_size", "3"], ["--batch-size", "3"], ["--batch-size=3"]):
        assert parser.parse_args(arguments).batch_size == 3
    assert parser.parse_args(["--name", "a-b"]).name == "a-b"
    assert parser.parse_args(["--name=--a-b"]).name == "--a-b"


def test_the_commit_is_asked_before_a_command_begins():
    package_commit.cache_clear()
    known = []
    run_command(lambda: known.append(package_commit.cache_info().currsize))
    assert known == [1]


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    def command():
        raise InputError("scan.nii.gz: truncated\nin the middle")

    assert run_command(command) == 2
    assert capsys.readouterr().err == "error: scan.nii.gz: truncated in the middle\n"
    assert run_command(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_a_command_that_fails_leaves_no_empty_folder(tmp_path):
    def command(written):
        make_folder(tmp_path / "old" / "new" / "newest")
        if written:
            (tmp_path / "old" / "new" / "result").touch()
        raise InputError("no")

    (tmp_path / "old").mkdir()
    for written, left in [(False, ["old"]), (True, ["new", "old", "result"])]:
        assert run_command(lambda written=written: command(written)) == 2
        assert sorted(path.name for path in tmp_path.rglob("*")) == left


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    expected = {"publish": "--repo_id", "publish-dataset": "--repo_id", "app": "--host"}
    assert expected.get(name, "--output") in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sgement"], ["segment"], ["demo", "--seed", "many"]])
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--seed", "0"], "trained"),
        (["--index", "-1"], "0 or more"),
        (["--seed", "7", "--index", "2", "--model", "missing"], "missing"),
    ],
)
def test_the_demo_refuses_what_it_can_not_show(options, reason, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert reason in error.splitlines()[-1] and "Traceback" not in error


def test_the_demo_finds_a_lesion(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert 0 < scores["FLAIR threshold"]["auprc"] < 1
    assert 0 < scores["this model"]["auprc"] <= 1
    patient = tmp_path / "segmentation" / "phantom-s1-0000"
    assert {"heatmap.nii.gz", "mask.nii.gz", "preview.png", "report.json"} <= {p.name for p in patient.iterdir()}
    assert "AUPRC" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_a_numbered_gpu_becomes_the_current_one(device, current, monkeypatch):
    # Accelerate trains on the current GPU, whatever the command line says
    found = []
    monkeypatch.setattr("diffusers_cf.inference.torch.zeros", lambda *_, device: None)
    monkeypatch.setattr("diffusers_cf.inference.torch.cuda.set_device", found.append)
    check_device_arguments(argparse.Namespace(device=device, batch_size=1, dtype="auto"))
    assert found == current


@pytest.mark.parametrize("features", [set(), {"_is_avx512_bf16_supported"}, {"_is_amx_tile_supported"}])
def test_auto_is_bfloat16_where_the_processor_computes_in_it(monkeypatch, features):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in features)
    for given, found in (("auto", "bfloat16" if features else "float32"), ("float32", "float32")):
        args = argparse.Namespace(device="cpu", batch_size=1, dtype=given)
        check_device_arguments(args)
        assert args.dtype == found


@pytest.mark.parametrize("computes", [True, False])
def test_emulated_bfloat16_is_warned_of(monkeypatch, caplog, computes):
    monkeypatch.setattr("diffusers_cf.inference.computes_in_bfloat16", lambda device: computes)
    args = argparse.Namespace(device="cpu", batch_size=1, dtype="bfloat16")
    check_device_arguments(args)
    assert args.dtype == "bfloat16"
    assert [record.message for record in caplog.records if "emulated" in record.message] == [
        "bfloat16 is emulated on this machine and many times slower than --dtype auto"
    ] * (not computes)


def test_a_processor_that_torch_tells_nothing_about_computes_in_float32(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    args = argparse.Namespace(device="cpu", batch_size=1, dtype="auto")
    check_device_arguments(args)
    assert args.dtype == "float32"


def test_a_model_in_use_is_laid_out_for_convolutions():
    weight = open_pipeline(str(PRETRAINED / "phantom_small")).unet.conv_in.weight
    assert weight.dtype == torch.float32 and weight.is_contiguous(memory_format=torch.channels_last)


def test_a_copy_is_told_its_commit(monkeypatch):
    package_commit.cache_clear()
    monkeypatch.setenv("DIFFUSERS_CF_COMMIT", "0123456")
    assert package_commit() == "0123456"
    package_commit.cache_clear()
    monkeypatch.delenv("DIFFUSERS_CF_COMMIT")
    assert package_commit() != "0123456"
