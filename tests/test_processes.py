"""Several processes and shards: an even split, the same result as one process, nothing computed twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import write_brats
from evaluation_data import write_dataset
from segmentation_files import make_pipe

from diffusers_cf.cli import main
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.processes import Share, share_of_work
from diffusers_cf.files import alone_at


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set") / "dataset", patients=5)


def without_time(result):
    return {key: value for key, value in result.items() if key not in ("seconds_per_slice", "command", "device")}


def run(*arguments):
    return main(["evaluate", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", [None, [155, 1, 140, 20, 155, 90, 30, 77, 12]])
def test_parts_are_disjoint_complete_and_even(count, sizes):
    items = list("abcdefghi")
    parts = [Share(index, count).of(items, sizes) for index in range(count)]
    assert sorted(item for part in parts for item in part) == items
    assert all(part == sorted(part) for part in parts)
    loads = [sum(1 if sizes is None else sizes[items.index(item)] for item in part) for part in parts]
    assert max(loads) - min(loads) <= (1 if sizes is None else max(sizes))
    if count == 2 and sizes:
        assert max(loads) / sum(loads) < 0.51


@pytest.mark.parametrize("shard", ["0/4", "5/4", "4", "a/b", "1/2/3"])
def test_a_malformed_shard_is_refused(shard):
    with pytest.raises(InputError, match=f"--shard {shard}: "):
        share_of_work(shard)


def test_a_launcher_and_a_shard_exclude_each_other_and_without_both_the_work_is_whole(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--shard can't be used under a launcher"):
        share_of_work("1/2")
    monkeypatch.setenv("WORLD_SIZE", "1")
    share = share_of_work(None)
    assert share == Share() and share.is_main and not share.is_shard and share.gather([1]) == [1]


def test_shards_from_the_command_line(dataset, tmp_path, capsys):
    """Shards may run beside the process that writes their output; a second writer is refused."""
    options, output = ["--method", "threshold-flair", "--dataset", dataset, "--output"], tmp_path / "several.json"
    assert run(*options, tmp_path / "one.json") == 0
    with alone_at(output):
        assert run(*options, output) == 2
        assert "several.json: another process" in capsys.readouterr().err
        for shard in ("1/2", "2/2"):
            # shards may use different devices; `cpu:0` is the only other name that works on every machine
            assert run(*options, output, "--shard", shard, "--device", "cpu:0") == 0
            assert f"shard {shard} is measured" in capsys.readouterr().out
            assert not output.exists()
    assert len(list((tmp_path / "several.parts").glob("*.npz"))) == 5
    assert run(*options, output) == 0
    one, several = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "several"))
    assert without_time(one) == without_time(several)
    names = {"one.json", "one.counts.npz", "several.json", "several.counts.npz"}
    assert {path.name for path in tmp_path.iterdir()} == names


def launch(*arguments):
    """Run `diffusers-cf` in two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [str(part) for part in (*torchrun, "diffusers_cf.cli", *arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_evaluate_a_model_as_one_does(dataset, model, tmp_path):
    """Equal up to rounding: batches hold other slices, so sums have another order."""
    options = ["evaluate", "--model", model, "--dataset", dataset, "--batch_size", 3, "--dtype", "float32", "--output"]
    done = launch(*options, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("20 slices of 5 patients") == 1 and not (tmp_path / "two.parts").exists()
    assert run(*options[1:], tmp_path / "one.json") == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for found, expected in ((two, one), (two["postprocessed"], one["postprocessed"])):
        for name in ("auprc", "ideal_dice", "foreground_auprc", "slice_auroc"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5)
        assert found["per_patient_dice"]["values"] == pytest.approx(expected["per_patient_dice"]["values"], abs=1e-5)


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    return [write_brats(folder / "data", f"P_0{i}", "LPS") for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    make_pipe().save_pretrained(folder)
    return folder


def test_shards_segment_each_patient_once(patients, model, tmp_path, capsys):
    command = ["segment", *patients, "--model", model, "--output", tmp_path / "out"]
    found = []
    for shard in ("1/2", "2/2"):
        assert main([str(part) for part in [*command, "--shard", shard]]) == 0
        found.append([line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ":" in line])
    assert found == [["P_00", "P_02"], ["P_01"]]
    assert main([str(part) for part in command]) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 3


@pytest.mark.slow
def test_two_processes_of_a_launcher_segment_and_one_patient_fails(patients, model, tmp_path):
    empty = tmp_path / "P_bad"
    empty.mkdir()
    done = launch("segment", empty, *patients, "--model", model, "--output", tmp_path / "out")
    assert done.returncode != 0
    assert sum(line.startswith("error: ") and "P_bad" in line for line in done.stderr.splitlines()) == 1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"P_00", "P_01", "P_02", "summary.csv", "summary.json"}
