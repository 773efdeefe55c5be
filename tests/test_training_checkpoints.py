"""Checkpoints: whole or not there, found again, and refused where they do not fit."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from safetensors import SafetensorError
from training_data import stub_accelerator

from diffusers_cf.errors import InputError
from diffusers_cf.training.checkpoints import STATE_FILE, find_checkpoint, finished_checkpoints, save_checkpoint


FACTS = {"seed": 3, "global_batch": 8, "slices": 16}


def save(folder, step, limit=None, save_model=Path.mkdir):
    save_checkpoint(stub_accelerator(), folder, FACTS | {"step": step}, save_model, limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    (tmp_path / ".checkpoint-2.tmp" / "left").mkdir(parents=True)
    save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2"]
    assert names(tmp_path / "checkpoint-2") == ["model.safetensors", "pipeline", STATE_FILE]
    assert find_checkpoint(tmp_path, "latest", FACTS) == (tmp_path / "checkpoint-2", FACTS | {"step": 2})

    for error in (OSError("disk full"), RuntimeError("unexpected pos: disk full"), SafetensorError("disk full")):
        fail = Mock(side_effect=error)
        for step in (2, 4):
            with pytest.raises(OSError, match=f"can't be written .*disk full.*checkpoint-{step}"):
                save(tmp_path, step, save_model=fail)
            assert find_checkpoint(tmp_path, "latest", FACTS) == (tmp_path / "checkpoint-2", FACTS | {"step": 2})
            assert names(tmp_path) == ["checkpoint-2"]


def test_the_limit_takes_the_oldest_and_never_the_new_one(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-15"]
    save(tmp_path, 12, limit=1)  # after a resume from 10
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-15"]
    save(tmp_path, 15, limit=1)
    assert names(tmp_path) == ["checkpoint-15"]


def test_a_kill_while_deleting_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    def killed_halfway(folder, **options):
        if Path(folder).exists():
            (Path(folder) / "model.safetensors").unlink()
            raise KeyboardInterrupt

    save(tmp_path, 5)
    monkeypatch.setattr("shutil.rmtree", killed_halfway)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10, limit=1)
    assert [path.name for path in finished_checkpoints(tmp_path)] == ["checkpoint-10"]


def test_what_to_resume_from(tmp_path):
    assert find_checkpoint(tmp_path, None, FACTS) is None
    assert find_checkpoint(tmp_path, "latest", FACTS) is None
    assert find_checkpoint(tmp_path / "none", "latest", FACTS) is None
    for step in (6, 8, 10):
        save(tmp_path, step)
    by_name, by_path = (find_checkpoint(tmp_path, n, FACTS) for n in ("checkpoint-6", str(tmp_path / "checkpoint-6")))
    assert by_name == by_path == (tmp_path / "checkpoint-6", FACTS | {"step": 6})
    for half_written in (".checkpoint-30.tmp", "checkpoint-40-copy", "checkpoint-x"):
        (tmp_path / "checkpoint-6").rename(tmp_path / half_written)
        save(tmp_path, 6)
    (tmp_path / "checkpoint-20").mkdir()
    assert [path.name for path in finished_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (6, 8, 10)]
    assert find_checkpoint(tmp_path, "latest", FACTS)[0].name == "checkpoint-10"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (None, "can't be read (No such file or directory)"),
        ('{"step": 6, "se', "not a readable complete checkpoint ("),
        ('{"seed": 3}', "not a readable complete checkpoint ("),
        (json.dumps({"step": 6} | FACTS | {"seed": 4}), "made with seed = 4, this run has 3"),
        (json.dumps({"step": 6} | FACTS | {"slices": 99}), "made with slices = 99, this run has 16"),
    ],
)
def test_checkpoints_that_cannot_be_resumed(tmp_path, state, reason):
    if state is not None:
        (tmp_path / "checkpoint-6").mkdir()
        (tmp_path / "checkpoint-6" / STATE_FILE).write_text(state)
    with pytest.raises(InputError) as error:
        find_checkpoint(tmp_path, "checkpoint-6", FACTS)
    assert str(error.value).startswith(f"{tmp_path / 'checkpoint-6'}: {reason}")
