"""The benchmark in several processes and in shards: each network is trained by one of them, each row measured once."""

import json
import os
import subprocess
import sys

import pytest

from diffusers_cf.cli import main


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    options = ["--seed", "7", "--patients", "5", "--size", "32", "--output", str(folder)]
    assert main(["prepare", "--source", "phantom", *options]) == 0
    return folder


def run(dataset, output, *more):
    return main(["benchmark", "--dataset", str(dataset), "--preset", "smoke", "--output", str(output), *more])


def test_several_processes_share_the_networks(dataset, tmp_path):
    methods = ["--methods", "threshold", "threshold-t1", "vae", "vae-restoration", "dae"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "diffusers_cf.cli", "benchmark", "--dataset", str(dataset), "--preset", "smoke", "--seeds", "1"]
    command += ["--output", str(tmp_path / "two"), *methods]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("tables and figures -> ") == 1
    table = json.loads((tmp_path / "two" / "table1.json").read_text())
    assert {row["method"] for row in table["rows"]} == set(methods[1:])
    assert {path.name for path in (tmp_path / "two" / "models").iterdir()} == {"vae-seed1", "dae-seed1"}


def test_shards_measure_each_row_once(dataset, tmp_path, capsys):
    options = ["--seeds", "1", "--methods", "threshold", "threshold-t1", "vae"]
    found = []
    for shard in ("1/2", "2/2"):
        assert run(dataset, tmp_path / "out", *options, "--shard", shard) == 0
        found.append([line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "AUPRC" in line])
        assert not (tmp_path / "out" / "table1.json").exists()
    assert sorted(found) == [["threshold", "threshold-t1"], ["vae"]]
    assert run(dataset, tmp_path / "out", *options) == 0
    assert "AUPRC" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "table1.json").read_text())["rows"]) == 3
