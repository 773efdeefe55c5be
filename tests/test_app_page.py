"""The page of `diffusers-cf app` without a browser: settings of the controls, uploaded files, and errors in one line."""

import gc
import os
import re
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from segmentation_files import MODALITIES, SIZE, make_pipe, write_cube

from diffusers_cf.baselines.student import Student
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation.patient import segmentation_facts


gradio = pytest.importorskip("gradio")
from diffusers_cf.app.page import Page  # noqa: E402
from diffusers_cf.app.uploads import take_scans  # noqa: E402


RECOMMENDED = {"guidance_scale": 12.0, "strength": 0.02, "num_inference_steps": 200, "threshold": 0.07109887152910233}


@pytest.fixture
def make_page(tmp_path, monkeypatch):
    (tmp_path / "uploads").mkdir(exist_ok=True)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))

    def make(modalities=MODALITIES, settings=RECOMMENDED):
        pipe = make_pipe(settings=settings, modalities=modalities)
        if settings.get("map") == "student":
            pipe.register_modules(student=Student(len(MODALITIES), SIZE, (8, 16)).network)
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
    assert make_page(settings=RECOMMENDED | {"threshold": None})._settings((12, 0.02, 200, 0))["threshold"] is None


def test_the_page_opens_on_a_phantom_and_its_controls_wait_for_it(page, make_page):
    (opening,) = [fn for fn in page.blocks.fns.values() if (page.blocks._id, "load") in fn.targets]
    chosen = [part.value for part in opening.inputs]
    assert "phantom 1" in chosen and not any(control.interactive for control in page.controls)
    _, _, shown = opening.fn(*chosen)
    assert all(shown[control]["interactive"] for control in page.controls if control is not page.index)
    assert "a simulated brain and no patient" in shown[page.message] and "<img" in shown[page.pictures]
    shown[page.explorer].close()
    other = make_page(modalities=["flair", "swi"])  # no phantom has it
    assert load(other, phantom=other.phantom.value) == []


def load(page, files=None, explorer=None, waiting=None, folder=None, phantom=None, paint=True):
    """Everything that loading tells the page; later updates hide earlier ones."""
    return list(page.load(explorer, waiting, files, folder, phantom, "flair", paint, *page.start_values.values()))


def test_loading_hides_the_earlier_patient_and_closes_it(page, uploads, tmp_path):
    taken, cleared, loaded = load(page, uploads)
    assert taken == {page.files: None, page.folder: None}
    assert cleared[page.explorer] is None and not cleared[page.index]["interactive"]
    assert loaded[page.index].interactive and "10 slices with content" in loaded[page.message]
    explorer = loaded[page.explorer]
    assert {path.parent for path in left(tmp_path)} == {explorer.scans}
    with pytest.raises(gradio.Error, match="the upload is gone"):
        load(page, [str(tmp_path / "uploads")], explorer)
    assert {path.parent for path in left(tmp_path)} == {explorer.scans}  # files that are none change nothing
    _, cleared, _ = load(page, None, explorer, phantom="phantom 1")
    assert cleared[page.explorer] is None and not explorer.scans.exists()


def test_files_one_by_one_wait_for_each_other(page, uploads, tmp_path):
    """Each belongs to the patient of the earlier ones, until there is a second one of a modality."""
    again = [shutil.copy(path, tmp_path / Path(path).name) for path in uploads]
    seg = shutil.copy(uploads[0], tmp_path / "uploads" / "P_01_seg.nii.gz")
    data = nib.load(seg)
    nib.save(nib.Nifti1Image((np.asanyarray(data.dataobj) > 500).astype(np.uint8), data.affine), seg)
    _, waits = load(page, uploads[1:])
    assert "Have flair; still missing: t1." in waits[page.message] and not waits[page.index]["interactive"]
    _, _, loaded = load(page, uploads[:1], waiting=waits[page.waiting])
    assert loaded[page.index].interactive and not Path(waits[page.waiting].name).exists()
    _, _, with_seg = load(page, None, loaded[page.explorer], folder=[seg])
    assert with_seg[page.explorer].volumes.seg.any() and not loaded[page.explorer].scans.exists()
    _, waits = load(page, again[:1], with_seg[page.explorer])
    assert "Have t1; still missing: flair." in waits[page.message] and not with_seg[page.explorer].scans.exists()
    assert [path.name for path in left(tmp_path)].count("P_01_T1n.nii.gz") == 1


def zip_of(paths, tmp_path, **others):
    path = tmp_path / "uploads" / "patient.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in others.items():
            packed.writestr(name, content)
        for number, file in enumerate(paths):
            packed.write(file, "../" * 9 * number + f"study/{number}/{Path(file).name}")
    return str(path)


def test_a_zip_is_unpacked_where_it_belongs(page, uploads, tmp_path):
    outside = set(tmp_path.parent.iterdir())
    _, _, loaded = load(page, [zip_of(uploads, tmp_path, **{"/etc/notes.txt": "x", "__MACOSX/._P_flair.nii.gz": "x"})])
    scans = loaded[page.explorer].scans
    assert loaded[page.index].interactive and set(tmp_path.parent.iterdir()) == outside
    assert sorted(path.name for path in scans.iterdir()) == ["P_01_T1n.nii.gz", "P_01_flair.nii.gz"]
    assert list(scans.parent.iterdir()) == [scans]  # the rest is deleted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"large_flair.nii": bytes(1 << 20), "b": b"b"}, "^'patient.zip: the limit is 10000 files and 1048576 bytes"),
        (dict.fromkeys(map(str, range(10_001)), b""), "the limit is 10000 files"),
        ({"a/P_flair.nii": b"x", "b/Q_flair.nii": b"x"}, "several scans are flair: P_flair.nii, Q_flair.nii"),
        ({"notes.txt": b"x"}, "notes.txt.*: no scan for this model: names end in flair, t2f, t1, t1n, t1w"),
    ],
)
def test_a_zip_that_is_no_patient_is_one_line_and_deleted(page, uploads, tmp_path, content, message):
    with pytest.raises(gradio.Error, match=message):
        load(page, [zip_of([], tmp_path, **content)])
    assert {str(path) for path in left(tmp_path)} == set(uploads)


def test_a_damaged_zip_is_one_line(page, uploads, tmp_path):
    path = Path(zip_of(uploads, tmp_path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(gradio.Error, match=r"^'patient.zip: not a readable zip file \(.*CRC"):
        load(page, [str(path)])


def test_a_student_shows_its_map_before_the_counterfactual_is_painted(make_page, uploads, record_calls):
    page = make_page(settings={"map": "student", "threshold": 0.5, "strength": 0.2, "num_inference_steps": 10})
    calls, start = record_calls(page.pipe), list(page.start_values.values())
    assert page.paint.visible and not page.paint.value and not make_page().paint.visible
    explorer = load(page, uploads, paint=False)[-1][page.explorer]
    (quick,) = page.show(explorer, 5, "flair", False, *start)
    assert not calls and quick[page.pictures].count("<figure") == 3
    first, painted = page.show(explorer, 5, "flair", True, *start)
    assert first == quick and painted[page.pictures].count("<figure") == 4 and len(calls) == 2 * 2
    assert explorer.view(5, page.recommended, False).heatmap.max() > 0.25  # a probability
    _, again = page.show(explorer, 5, "t1", True, *start)
    assert "counterfactual" in again[page.pictures] and len(calls) == 2 * 2
    _, _ = page.show(explorer, 5, "t1", True, 5.0, *start[1:])  # another guidance scale
    assert len(calls) == 3 * 2


def test_without_a_patient_the_controls_say_so(page):
    start = list(page.start_values.values())
    for handler in (page.show, page.segment):
        with pytest.raises(gradio.Error, match="load the patient again"):
            next(handler(None, 0, "flair", True, *start))


def rename(paths, name):
    paths[1] = str(Path(paths[1]).rename(Path(paths[1]).with_name(name)))


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (rename, "x_flair.nii.gz", "^several scans are flair: .*x_flair.nii.gz"),
        (lambda paths, _: os.truncate(paths[1], os.path.getsize(paths[1]) - 20), None, "^P_01_T1n.nii.gz: truncated"),
        (lambda paths, _: Path(paths[0]).unlink(), None, "the upload is gone"),
    ],
)
def test_files_that_are_no_patient_are_one_line_and_deleted(page, uploads, tmp_path, damage, name, message):
    uploads.sort(key=lambda path: "T1n" in path)
    damage(uploads, name)
    with pytest.raises(gradio.Error) as refused:
        load(page, uploads)
    assert re.search(message, refused.value.message)
    assert str(tmp_path) not in refused.value.message and "\n" not in refused.value.message
    assert not [path for path in left(tmp_path) if "uploads" not in str(path)]


@pytest.mark.parametrize("path", ["uploads", "sessions", "uploads/gone"])
def test_what_was_not_uploaded_is_left_alone(uploads, tmp_path, path):
    (tmp_path / "sessions").mkdir()
    with pytest.raises(InputError, match="the upload is gone"):
        take_scans([str(tmp_path / path)], tmp_path / "scans", MODALITIES, 1 << 20)
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
