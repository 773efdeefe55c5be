"""The page of `diffusers-cf app` without a browser: settings of the controls, uploaded files, and errors in one line."""

import gc
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from segmentation_files import MODALITIES, make_pipe, write_cube

from diffusers_cf.errors import InputError
from diffusers_cf.segmentation.patient import segmentation_facts


gradio = pytest.importorskip("gradio")
from diffusers_cf.app.page import Page, take_files  # noqa: E402


RECOMMENDED = {"guidance_scale": 12.0, "strength": 0.02, "num_inference_steps": 200, "threshold": 0.07109887152910233}


@pytest.fixture
def make_page(tmp_path, monkeypatch):
    (tmp_path / "uploads").mkdir(exist_ok=True)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))

    def make(modalities=MODALITIES, **settings):
        pipe = make_pipe(settings=RECOMMENDED | settings, modalities=modalities)
        return Page(pipe, segmentation_facts(pipe, needs_threshold=False), tmp_path, None, 1 << 20)

    return make


@pytest.fixture
def page(make_page):
    return make_page()


@pytest.fixture
def uploads(tmp_path):
    """The files of a patient, stored as gradio stores uploads."""
    paths = []
    for number, path in enumerate(sorted(write_cube(tmp_path / "P_01", "RAS", "RAS").iterdir())):
        folder = tmp_path / "uploads" / f"{number:064x}"
        folder.mkdir(parents=True)
        paths.append(shutil.move(path, folder))
    (tmp_path / "P_01").rmdir()
    return [str(path) for path in paths]


def left(folder):
    gc.collect()
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_control_that_was_not_moved_gives_exactly_the_recommended_value(page, make_page):
    assert page._settings((12, 0.02, 200, 0.071)) == page.recommended
    assert page._settings((3, 0.5, 40, 0.072)) == page.recommended | {
        "guidance_scale": 3, "strength": 0.5, "num_inference_steps": 40, "threshold": 0.072
    }  # fmt: skip
    assert [control.value for control in page.settings] == [12, 0.02, 200, 0.071]
    assert [count for _, count in page.settings[2].choices] == [4, 5, 8, 10, 20, 25, 40, 50, 100, 200]
    assert make_page(threshold=None)._settings((12, 0.02, 200, 0))["threshold"] is None


def test_the_page_opens_on_a_phantom_and_its_controls_wait_for_it(page, make_page):
    (opening,) = [fn for fn in page.blocks.fns.values() if (page.blocks._id, "load") in fn.targets]
    chosen = [part.value for part in opening.inputs]
    assert "phantom 1" in chosen and not any(control.interactive for control in page.controls)
    *_, shown = opening.fn(*chosen)
    assert all(shown[control]["interactive"] for control in page.controls if control is not page.index)
    assert "a simulated brain and no patient" in shown[page.message] and "<img" in shown[page.pictures]
    shown[page.explorer].close()
    other = make_page(modalities=["flair", "swi"])  # no phantom has it
    assert list(other.load(None, None, other.phantom.value, "flair", *other.start_values.values())) == []


def test_loading_hides_the_earlier_patient_and_closes_it(page, uploads, tmp_path):
    start = list(page.start_values.values())
    events = page.load(None, uploads, None, "flair", *start)
    cleared, loaded = next(events), next(events)
    assert cleared[page.explorer] is None and not cleared[page.index]["interactive"] and cleared[page.files] is None
    assert loaded[page.index].interactive and "10 slices with content" in loaded[page.message]
    explorer = loaded[page.explorer]
    assert {path.parent for path in left(tmp_path)} == {explorer.scans}
    events = page.load(explorer, [str(tmp_path / "uploads")], None, "flair", *start)
    cleared = next(events)
    assert cleared[page.explorer] is None and not left(tmp_path)
    with pytest.raises(gradio.Error):
        next(events)


def test_without_a_patient_the_controls_say_so(page):
    start = list(page.start_values.values())
    for handler in (page.show, page.segment):
        with pytest.raises(gradio.Error, match="load the patient again"):
            handler(None, 0, "flair", *start)


def rename(paths, name):
    paths[1] = str(Path(paths[1]).rename(Path(paths[1]).with_name(name)))


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (rename, "x_flair.nii.gz", "^modality missing: t1"),
        (rename, "P_01_flair.nii.gz", "P_01_flair.nii.gz.* already exists"),
        (lambda paths, _: os.truncate(paths[1], os.path.getsize(paths[1]) - 20), None, "^P_01_T1n.nii.gz: truncated"),
        (lambda paths, _: paths.pop(0), None, "^modality missing: "),
        (lambda paths, _: Path(paths[0]).unlink(), None, "the upload is gone"),
    ],
)
def test_files_that_are_no_patient_are_one_line_and_deleted(page, uploads, tmp_path, damage, name, message):
    uploads.sort(key=lambda path: "T1n" in path)
    damage(uploads, name)
    events = page.load(None, uploads, None, "flair", *page.start_values.values())
    next(events)
    with pytest.raises(gradio.Error) as refused:
        next(events)
    assert re.search(message, refused.value.message)
    assert str(tmp_path) not in refused.value.message and "\n" not in refused.value.message
    assert not [path for path in left(tmp_path) if "uploads" not in str(path)]


@pytest.mark.parametrize("path", ["uploads", "sessions", "uploads/gone"])
def test_what_was_not_uploaded_is_left_alone(uploads, tmp_path, path):
    (tmp_path / "sessions").mkdir()
    with pytest.raises(InputError, match="the upload is gone"):
        take_files([str(tmp_path / path)], tmp_path / "scans")
    assert (tmp_path / "sessions").exists() and all(Path(upload).exists() for upload in uploads)


def fail(page, error):
    with pytest.raises(gradio.Error) as refused, page._errors_shown():
        raise error
    return refused.value.message


def test_an_error_of_ours_names_no_file_in_the_log(page, capsys, tmp_path):
    name = "-".join(["Surname", "Firstname_t1.nii.gz"])  # a traceback quotes the source
    assert "a fault of this program (KeyError)" in fail(page, KeyError(name))
    log = capsys.readouterr().err
    assert name not in log and "test_app_page.py" in log
    assert fail(page, InputError(f"{tmp_path}/tmp_1/P/<b>.nii: damaged")) == "&lt;b&gt;.nii: damaged"
    assert fail(page, InputError(f"{tmp_path}/tmp_1/P: modality missing: t1")) == "modality missing: t1"


CPU_OUT_OF_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), CPU_OUT_OF_MEMORY])
def test_too_little_memory_is_no_fault_of_ours(page, error, capsys):
    assert "out of memory: try" in fail(page, error) and not capsys.readouterr().err
