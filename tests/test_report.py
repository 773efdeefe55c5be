"""The report: what stands on the page, that it needs nothing from elsewhere, and what happens to damaged patients."""

import json
import re

import numpy as np
import pytest
from segmentation_files import CUBE, SETTINGS, BrightnessPipeline, make_pipe, write_cube

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.report import add_report_arguments, ranges, run_report
from diffusers_cf.volumes import segment_patient


def run(*arguments):
    """Exit code of `diffusers-cf report ARGUMENTS`."""
    parser = ArgumentParser(prog="diffusers-cf report")
    add_report_arguments(parser)
    return run_command(lambda: run_report(parser.parse_args([str(argument) for argument in arguments])))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Scans of two patients with a bright cube, and what `segment` makes of them by brightness."""
    folder = tmp_path_factory.mktemp("cohort")
    pipe = make_pipe(BrightnessPipeline, settings=SETTINGS | {"threshold": 0.5})
    (folder / "scans").mkdir()
    for name in ("P_01", "P_02"):
        scans = write_cube(folder / "scans" / name, "RAS", "LPS")
        segment_patient(pipe, scans, folder / "out", model="models/<b>bold", progress=False)
    return folder


@pytest.fixture
def out(cohort, tmp_path):
    """A copy of the results that a test may damage."""
    import shutil

    return shutil.copytree(cohort / "out", tmp_path / "out")


def text_of(page):
    """The page without viewers, scripts and tags."""
    page = re.sub(r'srcdoc="[^"]*"|<script>.*?</script>|<style>.*?</style>', "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def test_the_page_says_what_segment_found(cohort, tmp_path, capsys):
    page = tmp_path / "new" / "report.html"
    assert run(cohort / "out", "--scans", cohort / "scans", "--output", page) == 0
    assert capsys.readouterr().out == f"2 patients, 0 failed -> {page}\n"
    text, facts = text_of(page.read_text()), json.loads((cohort / "out" / "P_01" / "report.json").read_text())
    depths = np.arange(12)[CUBE[2]]
    millilitres = facts["lesion_volume_ml"]
    assert "Lesions of 2 patients" in text and "not for clinical use" in text
    assert f"{millilitres:.1f} ml above the threshold of 0.5" in text
    assert f"Axial slices with lesion: {depths[0]} to {depths[-1]}, the largest" in text
    assert f"P_01 {millilitres:.1f} {len(depths)} of {facts['n_slices']}" in text
    assert "w = 2, L = 0.2, 10 steps, map counterfactual, not post-processed" in text
    assert "Heat over flair" in text and text.count("Scroll through the volume") == 2


def test_the_largest_slice_is_measured_in_mm2(cohort, tmp_path):
    import nibabel

    mask = nibabel.load(cohort / "out" / "P_01" / "mask.nii.gz")
    areas = (mask.get_fdata() > 0).sum(axis=(0, 1)) * np.prod(mask.header.get_zooms()[:2])
    assert run(cohort / "out" / "P_01", "--output", tmp_path / "report.html") == 0
    text = text_of((tmp_path / "report.html").read_text())
    assert f"the largest, {areas.max():.0f} mm², in slice {areas.argmax()}" in text and areas.max() > 1
    assert (
        "Lesions of P_01" in text and "Heat over the counterfactual of flair (--scans shows the scan itself)" in text
    )


def test_the_page_fetches_nothing_and_escapes_names(cohort, tmp_path):
    page = tmp_path / "report.html"
    assert run(cohort / "out", "--scans", cohort / "scans", "--output", page) == 0
    content = page.read_text().replace("&#34;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[a-z/]""", content.split("<script>")[0])
    assert not re.findall(r"<link\s[^>]*href|@import|url\(\s*[\"']?http", content)
    assert "<b>bold" not in page.read_text() and "&lt;b&gt;bold" in page.read_text()


def test_a_patient_that_can_not_be_read_is_named_and_the_others_are_there(cohort, out, tmp_path, capsys):
    path = out / "P_01" / "mask.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert run(out, "--output", tmp_path / "report.html") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "P_01/mask.nii.gz" in errors[0]
    text = text_of((tmp_path / "report.html").read_text())
    assert "Not in this report:" in text and "Lesions of P_02" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "report.json").write_text("{"), "report.json: damaged"),
        (
            lambda folder: (folder / "report.json").write_text("{}"),
            "report.json: lacks patient: not a report of segment",
        ),
        (lambda folder: (folder / "report.json").write_text("[]"), "report.json: damaged"),
        (lambda folder: (folder / "preview.png").unlink(), "preview.png: can't be read"),
        (lambda folder: (folder / "counterfactual_flair.nii.gz").unlink(), "counterfactual_flair.nii.gz"),
    ],
)
def test_damaged_results_are_one_line(out, tmp_path, capsys, damage, message):
    damage(out / "P_01")
    assert run(out / "P_01", "--output", tmp_path / "report.html") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "report.html").exists()


def test_other_scans_are_not_shown(cohort, tmp_path, capsys):
    write_cube(tmp_path / "P_01", "LPS", "LPS")
    assert run(cohort / "out" / "P_01", "--scans", tmp_path / "P_01", "--output", tmp_path / "report.html") == 2
    assert "its flair is not the one that was segmented as P_01" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT", "--output", "report.pdf"], "report.pdf: the output must be a file REPORT.html"),
        (["nowhere", "--output", "report.html"], "nowhere: no such folder"),
        (["OUT/../scans", "--output", "report.html"], "segment has written nothing in it (report.json is missing)"),
        (["OUT", "--scans", "nowhere", "--output", "report.html"], "nowhere: no such folder"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(cohort, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*[argument.replace("OUT", str(cohort / "out")) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_ranges():
    assert ranges([3, 4, 5, 9, 11, 12]) == "3 to 5, 9, 11 to 12" and ranges([]) == "" and ranges([0]) == "0"
