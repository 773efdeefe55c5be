"""Folders that are whole or not there: one process at a time, and what is left of one that was killed."""

import os
import subprocess
import sys

import pytest
from filelock import FileLock

from diffusers_cf.errors import InputError
from diffusers_cf.whole_folders import alone_at, new_folder, tidy


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(target, text):
    with alone_at(target), new_folder(target) as temporary:
        (temporary / "file").write_text(text)


def test_a_folder_gets_its_place_when_it_is_whole(tmp_path):
    target = tmp_path / "out" / "P"
    with alone_at(target), new_folder(target) as temporary:
        (temporary / "file").write_text("new")
        assert not target.exists() and ".P.lock" in names(tmp_path / "out")
    assert names(tmp_path / "out") == ["P"] and (target / "file").read_text() == "new"
    write(target, "newer")
    assert names(tmp_path / "out") == ["P"] and (target / "file").read_text() == "newer"


def test_a_folder_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path / "P", "old")
    with pytest.raises(InputError, match=r"P: can't be written \(No space left"):
        with alone_at(tmp_path / "P"), new_folder(tmp_path / "P") as temporary:
            (temporary / "file").write_text("half")
            raise OSError(28, "No space left on device")
    replace = os.replace

    def no_second(source, goal):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        replace(source, goal)

    monkeypatch.setattr(os, "replace", no_second)  # the old one has stepped aside by then
    with pytest.raises(InputError, match="Input/output error"):
        write(tmp_path / "P", "new")
    assert names(tmp_path) == ["P"] and (tmp_path / "P" / "file").read_text() == "old"


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("rename") or replace(*paths))
    write(tmp_path / "P", "new")
    temporary = str(tmp_path / ".P.tmp")
    assert done == [f"{temporary}/file", temporary, "rename", str(tmp_path)]


def test_another_process_is_kept_off_and_its_work_stays(tmp_path):
    (tmp_path / ".P.tmp").mkdir()
    (tmp_path / ".P.tmp" / "half").touch()
    with FileLock(tmp_path / ".P.lock"), pytest.raises(InputError, match="P: another process is writing it"):
        write(tmp_path / "P", "mine")
    assert names(tmp_path / ".P.tmp") == ["half"]
    with FileLock(tmp_path / ".P.lock"):
        tidy(tmp_path / "P")
        assert names(tmp_path / ".P.tmp") == ["half"]


@pytest.mark.parametrize("moment", ["while it was written", "between the two renames", "before the old one went"])
def test_what_a_killed_process_left_goes_with_the_next(tmp_path, moment):
    write(tmp_path / "P", "old")
    code = (
        "import os, sys; from pathlib import Path; from diffusers_cf.whole_folders import alone_at, new_folder\n"
        "target, moment = Path(sys.argv[1]), sys.argv[2]\n"
        "die = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        "import shutil; replace, rmtree = os.replace, shutil.rmtree\n"
        "if moment == 'between the two renames': os.replace = lambda a, b: (replace(a, b), die())\n"
        "if moment == 'before the old one went':"
        " shutil.rmtree = lambda path, **_: die() if Path(path).exists() else None\n"
        "with alone_at(target), new_folder(target) as temporary:\n"
        "    (temporary / 'file').write_text('new')\n"
        "    if moment == 'while it was written': die()\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "P", moment]).returncode == -9
    assert len(names(tmp_path)) > 1
    tidy(tmp_path / "P")
    expected = "new" if moment == "before the old one went" else "old"
    assert names(tmp_path) == ["P"] and (tmp_path / "P" / "file").read_text() == expected


def test_a_place_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"P: can't be written \(Not a directory|File exists"):
        write(tmp_path / "file" / "P", "new")
