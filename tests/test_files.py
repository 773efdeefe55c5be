"""Files and folders that are whole or not there: one process at a time, and what is left of one that was killed."""

import os
import stat
import subprocess
import sys

import pytest
from filelock import FileLock

from diffusers_cf.errors import InputError
from diffusers_cf.files import alone_at, new_file, new_folder, read_json, tidy, write_json


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
    with pytest.raises(OSError, match="No space left"):
        with alone_at(tmp_path / "P"), new_folder(tmp_path / "P") as temporary:
            (temporary / "file").write_text("half")
            raise OSError(28, "No space left on device")
    replace = os.replace

    def no_second(source, goal):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        replace(source, goal)

    monkeypatch.setattr(os, "replace", no_second)  # the old one has stepped aside by then
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "P", "new")
    assert names(tmp_path) == ["P"] and (tmp_path / "P" / "file").read_text() == "old"


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("rename") or replace(*paths))
    write(tmp_path / "P", "new")
    file, temporary, *rest = done
    assert temporary.startswith(str(tmp_path / ".P.tmp-")) and file == f"{temporary}/file"
    assert rest == ["rename", str(tmp_path)]


def test_another_process_is_kept_off_and_its_work_stays(tmp_path):
    (tmp_path / ".P.tmp-x" / "half").mkdir(parents=True)
    with FileLock(tmp_path / ".P.lock"), pytest.raises(InputError, match="P: another process is writing it"):
        write(tmp_path / "P", "mine")
    assert names(tmp_path / ".P.tmp-x") == ["half"]
    with FileLock(tmp_path / ".P.lock"):
        tidy(tmp_path / "P")
        assert names(tmp_path / ".P.tmp-x") == ["half"]


@pytest.mark.parametrize("moment", ["while it was written", "between the two renames", "before the old one went"])
def test_what_a_killed_process_left_goes_with_the_next(tmp_path, moment):
    write(tmp_path / "P", "old")
    code = (
        "import os, sys; from pathlib import Path; from diffusers_cf.files import alone_at, new_folder\n"
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


def test_a_file_gets_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "out.json"
    write_json({"a": 1}, path)
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_text("half")
        assert len(names(tmp_path)) == 2 and path.read_text() == '{\n  "a": 1\n}\n'
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out.json"] and read_json(path) == {"a": 1}
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"a": float("nan")}, path)
    assert read_json(path) == {"a": 1}


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(OSError, match="out.json") as caught, new_file(tmp_path / "out.json"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "out.json") and names(tmp_path) == []


def test_no_link_is_followed(tmp_path):
    """Whoever can write to the folder may plant links of any name that can be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".out.json.tmp", f".out.json.{os.getpid()}", "out.json"):
        (tmp_path / name).symlink_to(victim)
    write_json({"a": 1}, tmp_path / "out.json")
    assert victim.read_text() == "precious" and read_json(tmp_path / "out.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "not a readable JSON"), (b"[1]", "not a JSON object"), (b"\xff", "not a readable"), (None, "can't be")],
)
def test_json_that_is_no_object(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=f"x.json: {reason}"):
        read_json(tmp_path / "x.json")
