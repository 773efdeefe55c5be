"""The report: what stands on the page, that it needs nothing from elsewhere, and what happens to damaged patients."""

import html
import json
import os
import re
from functools import partial

import nibabel
import numpy as np
import pytest
from segmentation_files import CUBE, SETTINGS, BrightnessPipeline, make_pipe, write_cube

from diffusers_cf.arguments import ArgumentParser, run_command
from diffusers_cf.segmentation.patient import segment_patient
from diffusers_cf.segmentation.report import add_report_arguments, ranges, run_report
from diffusers_cf.segmentation.results import add_to_summary


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
    mask = nibabel.load(cohort / "out" / "P_01" / "mask.nii.gz")
    areas = (mask.get_fdata() > 0).sum(axis=(0, 1)) * np.prod(mask.header.get_zooms()[:2])
    assert run(cohort / "out" / "P_01", "--output", tmp_path / "report.html") == 0
    text = text_of((tmp_path / "report.html").read_text())
    assert f"the largest, {areas.max():.0f} mm², in slice {areas.argmax()}" in text and areas.max() > 1
    assert (
        "Lesions of P_01" in text and "Heat over the counterfactual of flair (--scans shows the scan itself)" in text
    )


def foreign_addresses(page):
    """Every address in the page, scripts and viewers included, that a browser would fetch from elsewhere."""
    for _ in range(2):  # a viewer is a page in an attribute, and may hold such attributes itself
        page = html.unescape(page)
    found = re.findall(r"""(?:\bsrc|\bhref|\baction|\bdata|\bposter)\s*=\s*["']?([^"'\s>]+)""", page)
    found += re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']?([^"';]+)""", page)
    flat = [part for match in found for part in ([match] if isinstance(match, str) else match)]
    return [address for address in flat if re.match(r"(?i)(?:https?:|ftp:|wss?:)?//", address)]


def test_the_page_fetches_nothing_and_escapes_names(cohort, tmp_path):
    page = tmp_path / "report.html"
    assert run(cohort / "out", "--scans", cohort / "scans", "--output", page) == 0
    content = page.read_text()
    assert foreign_addresses(content) == []
    assert foreign_addresses(content.replace("</body>", '<script>x.src="https://host/a.js"</script>')) != []
    assert "default-src 'none'" in content and content.count('sandbox="allow-scripts"') == 2
    assert "<b>bold" not in content and "&lt;b&gt;bold" in content


def test_a_patient_that_can_not_be_read_is_named_and_the_others_are_there(cohort, out, tmp_path, capsys):
    path = out / "P_01" / "mask.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert run(out, "--output", tmp_path / "report.html") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "P_01/mask.nii.gz" in errors[0]
    text = text_of((tmp_path / "report.html").read_text())
    assert "Not in this report:" in text and "Lesions of P_02" in text


def elsewhere(name, folder):
    """Puts a link in the place of a file."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def pipe_for(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)


def scaled(name, factor, folder):
    image = nibabel.load(folder / f"{name}.nii.gz")
    data = (factor * image.get_fdata()).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, image.affine), folder / f"{name}.nii.gz")


def fact(name, value, folder):
    facts = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(facts | {name: value}))


def setting(name, value, folder):
    facts = json.loads((folder / "report.json").read_text())
    fact("settings", facts["settings"] | {name: value}, folder)


SCRIPT = "<script>alert(1)</script>"
FOREIGN_FACTS = [
    ("patient", SCRIPT, '"<script>'), ("patient", "../P_02", '"../P_02"'), ("patient", 7, "7"), ("model", None, "null"),
    ("model_sha256", "x" * 64, '"xxx'), ("settings", [], "[]"), ("threshold", float("nan"), "NaN"),
    ("threshold", 0, "0"), ("threshold", "0.5", '"0.5"'), ("threshold", True, "true"),
    ("threshold", float("inf"), "Infinity"), ("postprocessed", "no", '"no"'), ("inputs", {}, "{}"),
    ("inputs", {"seg": "0" * 64}, '{"seg"'), ("inputs", {"../../x": "0" * 64}, '{"../../x"'), ("inputs", ["flair"], '["'),
    ("inputs", {"flair": "short"}, '{"flair"'), ("lesion_volume_ml", "much", '"much"'), ("lesion_volume_ml", -1, "-1"),
    ("n_slices", 2.5, "2.5"), ("dice", "x", '"x"'), ("dice", 7, "7"), ("auprc", [1], "[1]"),
]  # fmt: skip
FOREIGN_SETTINGS = [("strength", "high"), ("map", SCRIPT), ("num_inference_steps", 1e9), ("guidance_scale", None)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "report.json").write_text("{"), "report.json: not readable as JSON"),
        (
            lambda folder: (folder / "report.json").write_text("{}"),
            "report.json: lacks patient: not a report of segment",
        ),
        (lambda folder: (folder / "report.json").write_text("[]"), "report.json: not a JSON object"),
        (
            lambda folder: (folder / "report.json").write_text('{"a":' * 10**5 + "1" + "}" * 10**5),
            "not readable as JSON",
        ),
        (lambda folder: (folder / "report.json").write_text("9" * 5000), "not readable as JSON"),
        (lambda folder: (folder / "report.json").write_text(" " * (17 << 20)), "report.json: larger than 16 MiB"),
        (lambda folder: (folder / "preview.png").unlink(), "preview.png: can't be read"),
        (lambda folder: (folder / "preview.png").write_text("<svg/>"), "preview.png: no PNG file"),
        (lambda folder: (folder / "counterfactual_flair.nii.gz").unlink(), "counterfactual_flair.nii.gz"),
        *((partial(elsewhere, name), f"{name}: a link or no file") for name in ("preview.png", "report.json")),
        *((partial(elsewhere, name), f"{name}: a link or no file") for name in ("mask.nii.gz", "heatmap.nii.gz")),
        (partial(elsewhere, "counterfactual_flair.nii.gz"), "counterfactual_flair.nii.gz: a link or no file"),
        (partial(pipe_for, "preview.png"), "preview.png: a link or no file"),
        (partial(scaled, "mask", 0.5), "mask.nii.gz: holds 0.5: a mask of segment holds 0 and 1 alone"),
        (partial(scaled, "mask", 2), "mask.nii.gz: holds 2: a mask of segment holds 0 and 1 alone"),
        (partial(scaled, "counterfactual_flair", 0), "the counterfactual of flair is empty: no voxel above 0"),
        *((partial(fact, *change), f"report.json: {change[0]} is {shown}") for *change, shown in FOREIGN_FACTS),
        *((partial(setting, *change), f"report.json: {change[0]} is ") for change in FOREIGN_SETTINGS),
    ],
)
def test_damaged_results_are_one_line(out, tmp_path, capsys, damage, message):
    damage(out / "P_01")
    assert run(out / "P_01", "--output", tmp_path / "report.html") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "report.html").exists()


def test_a_folder_behind_a_link_is_not_shown_unless_it_is_given(cohort, out, tmp_path, capsys):
    (out / "P_03").symlink_to(cohort / "out" / "P_01")
    (out / ".P_04.tmp").mkdir()
    (out / ".P_04.tmp" / "report.json").write_text("{")  # of a process at work
    assert run(out, "--output", tmp_path / "report.html") == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {out / 'P_03'}: a link: give the folder that it leads to"]
    assert printed.out.startswith("2 patients, 1 failed")
    assert run(out / "P_03", "--output", tmp_path / "report.html") == 0


def test_patients_that_segment_failed_on_are_named(out, tmp_path, capsys):
    outcomes = {"P_07": {"state": "failed", "reason": f"t1.nii.gz: truncated {SCRIPT}"}, "P_01": {"state": "done"}}
    add_to_summary(out, outcomes)
    assert run(out, "--output", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert "Not segmented: P_07: t1.nii.gz: truncated" in text_of(page) and SCRIPT not in page
    (out / "summary.json").write_text('{"patients": {"P": {"state": "failed"}}}')
    assert run(out, "--output", tmp_path / "report.html") == 2
    assert "summary.json: not a summary of segment" in capsys.readouterr().err


def test_a_viewer_that_can_not_be_made_costs_one_patient(cohort, tmp_path, capsys, monkeypatch):
    from nilearn import plotting

    view_img = plotting.view_img

    def picky(*args, title, **options):
        if title == "P_01":
            raise ValueError("zero-size array")
        return view_img(*args, title=title, **options)

    monkeypatch.setattr(plotting, "view_img", picky)
    assert run(cohort / "out", "--output", tmp_path / "report.html") == 2
    assert "P_01/heatmap.nii.gz: no viewer shows it (zero-size array)" in capsys.readouterr().err
    assert "Lesions of P_02" in text_of((tmp_path / "report.html").read_text())


def test_an_output_that_can_not_be_written_is_one_line(cohort, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    assert run(cohort / "out" / "P_01", "--output", tmp_path / "report.html") == 2
    assert "report.html: can't be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
