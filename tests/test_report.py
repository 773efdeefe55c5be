"""The report: what is on the page, that it loads nothing from the network, and what happens to damaged results."""

import json
import shutil
import weakref
from unittest.mock import DEFAULT, Mock

import nibabel
import numpy as np
import pytest
from segmentation_files import (
    CUBE,
    BrightnessPipeline,
    cli,
    error_lines,
    foreign_addresses,
    make_pipe,
    text_of,
    write_cube,
)

from diffusers_cf.segmentation import report as report_module
from diffusers_cf.segmentation.cohorts import add_to_summary
from diffusers_cf.segmentation.patient import segment_patient
from diffusers_cf.segmentation.report import ranges


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytest.importorskip("nilearn", reason="viewers need nilearn")
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Scans of two patients with a bright cube, and what `segment` makes of them by brightness."""
    folder = tmp_path_factory.mktemp("cohort")
    pipe = make_pipe(BrightnessPipeline)
    (folder / "scans").mkdir()
    for name in ("P_01", "P_02"):
        scans = write_cube(folder / "scans" / name, "RAS", "LPS")
        segment_patient(pipe, scans, folder / "out", model="models/<b>bold", threshold=0.5, progress=False)
    return folder


@pytest.fixture
def out(cohort, tmp_path):
    """A copy of the results that a test may damage."""
    return shutil.copytree(cohort / "out", tmp_path / "out")


@pytest.fixture
def page(tmp_path):
    return tmp_path / "new" / "report.html"


def edit(folder, **entries):
    """Change entries of a report.json."""
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | entries))


def test_the_page_says_what_segment_found(cohort, page, capsys):
    arguments = ("report", cohort / "out", "--scans", cohort / "scans", "--output", page)
    assert cli(*arguments, "--neurological") == 0 and "(neurological: the patient" in page.read_text()
    capsys.readouterr()
    assert cli(*arguments) == 0 and "(radiological: the patient" in page.read_text()
    assert capsys.readouterr().out == f"2 patients, 0 failed -> {page}\n"
    text, report = text_of(page.read_text()), json.loads((cohort / "out" / "P_01" / "report.json").read_text())
    depths, millilitres = np.arange(12)[CUBE[2]], report["lesion_volume_ml"]
    mask = nibabel.load(cohort / "out" / "P_01" / "mask.nii.gz")
    areas = (mask.get_fdata() > 0).sum(axis=(0, 1)) * np.prod(mask.header.get_zooms()[:2])
    assert f"P_01 {millilitres:.1f} {len(depths)} of {report['n_slices']} {areas.max():.0f} " in text
    assert f"Axial slices with lesion: {depths[0]} to {depths[-1]} " in text and f"in slice {areas.argmax()}" in text
    assert "not for clinical use" in text and "Dice" not in text
    assert "over flair" in text and text.count("Scroll through the volume") == 2


def test_the_page_loads_nothing_and_escapes_names(cohort, out, page):
    edit(out / "P_02", patient=SCRIPT)
    assert cli("report", out, "--scans", cohort / "scans", "--output", page) == 0
    content = page.read_text()
    assert foreign_addresses(content) == []
    assert foreign_addresses(content.replace("</body>", '<script>x.src="https://host/a.js"</script>')) != []
    assert "default-src 'none'" in content and content.count('sandbox="allow-scripts"') == 2
    assert "<b>bold" not in content and "&lt;b&gt;bold" in content and SCRIPT not in content


def test_one_patient_is_in_memory_at_a_time(cohort, page, monkeypatch):
    to_canonical, volumes, alive = report_module.to_canonical, [], []

    def watched(scan):
        canonical = to_canonical(scan)
        volumes.extend(map(weakref.ref, (scan.data, canonical.data)))
        return canonical

    def viewer(*_):
        alive.append(sum(volume() is not None for volume in volumes[:-4]))  # of all but this patient
        return "viewer"

    monkeypatch.setattr(report_module, "to_canonical", watched)
    monkeypatch.setattr(report_module, "volume_viewer", viewer)
    assert cli("report", cohort / "out", "--output", page) == 0
    assert len(volumes) == 16 and alive == [0, 0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("report.json", "{", "report.json: not a readable JSON file"),
        ("report.json", "{}", "report.json: not a report of segment"),
        ("mask.nii.gz", "damaged", "P_01/mask.nii.gz"),
    ],
)
def test_a_patient_that_can_not_be_read_is_named(out, page, capsys, file, content, message):
    (out / "P_01" / file).write_text(content)
    assert cli("report", out / "P_01", "--output", page) == 2
    assert message in error_lines(capsys.readouterr())[0] and not page.exists()
    assert cli("report", out, "--output", page) == 2
    (line,) = error_lines(capsys.readouterr())
    text = text_of(page.read_text())
    assert message in line and "Not in this report:" in text and "Lesions of P_02" in text


@pytest.mark.parametrize("file", ["preview.png", "counterfactual_flair.nii.gz", "heatmap.nii.gz"])
def test_a_patient_without_a_viewer_is_in_the_table(out, page, capsys, monkeypatch, file):
    from nilearn import plotting

    if file == "heatmap.nii.gz":
        view_img = Mock(wraps=plotting.view_img, side_effect=[ValueError("zero-size array"), DEFAULT])
        monkeypatch.setattr(plotting, "view_img", view_img)
    else:
        (out / "P_01" / file).unlink()
    assert cli("report", out, "--output", page) == 2
    printed = capsys.readouterr()
    (line,) = error_lines(printed)
    assert printed.out.startswith("2 patients, 1 failed") and f"P_01/{file}: " in line
    text = text_of(page.read_text())
    assert "Lesions of 2 patients" in text and text.count("Scroll through the volume") == 1
    assert f"No viewer: {out / 'P_01' / file}" in text


def test_other_scans_are_not_shown(cohort, page, tmp_path, capsys):
    write_cube(tmp_path / "P_01", "LPS", "LPS")
    assert cli("report", cohort / "out" / "P_01", "--scans", tmp_path / "P_01", "--output", page) == 2
    assert "P_01_flair.nii.gz: not the flair that was segmented as P_01" in capsys.readouterr().err
    assert "Scroll through the volume" not in text_of(page.read_text())


def test_failures_and_dice_of_segment_are_shown(out, page, monkeypatch):
    outcomes = {"P_07": {"state": "failed", "reason": f"t1.nii.gz: truncated {SCRIPT}"}, "P_01": {"state": "done"}}
    add_to_summary(out, outcomes)
    (out / ".P_04.tmp-x").mkdir()  # of a running process
    (out / ".P_04.tmp-x" / "report.json").write_text("{")
    edit(out / "P_01", dice=0.875)
    edit(out / "P_02", dice=SCRIPT, lesion_volume_ml=900.0)
    draw = Mock(wraps=report_module.plot_cohort)
    monkeypatch.setattr(report_module, "plot_cohort", draw)
    assert cli("report", out, "--output", page) == 0
    content = page.read_text()
    assert "Not segmented: P_07: t1.nii.gz: truncated" in text_of(content) and SCRIPT not in content
    ((_, names, (first, second), scores), _) = draw.call_args
    assert names == ["P_01", "P_02"] and (first < 900, second) == (True, 900)
    assert scores == {"Dice": [0.875, None], "AUPRC": [None, None]}
    assert 'alt="Lesion volumes, and scores' in content
    assert " 0.88 " in text_of(content) and "over the counterfactual of flair" in text_of(content)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT", "--output", "report.pdf"], "report.pdf: the output must be a file REPORT.html"),
        (["nowhere", "--output", "report.html"], "nowhere: No such file"),
        (["OUT/../scans", "--output", "report.html"], "report.json is missing"),
        (["OUT", "--scans", "nowhere", "--output", "report.html"], "nowhere: No such file"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(cohort, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli("report", *[argument.replace("OUT", str(cohort / "out")) for argument in arguments]) == 2
    (line,) = error_lines(capsys.readouterr())
    assert message in line and list(tmp_path.iterdir()) == []


def test_ranges():
    assert ranges([3, 4, 5, 9, 11, 12]) == "3 to 5, 9, 11 to 12" and ranges([]) == "" and ranges([0]) == "0"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium)")
def test_the_page_in_a_browser_without_network(out, page):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    edit(out / "P_01", lesion_volume_ml=10.5)
    edit(out / "P_02", lesion_volume_ml=9.0)  # text would come after 10.5
    assert cli("report", out, "--output", page) == 0
    requests, errors = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(offline=True).new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.goto(page.as_uri())
        column = tab.locator("#patients tbody tr td:nth-child(2)")
        for expected in ([9, 10.5], [10.5, 9]):
            tab.get_by_role("button", name="Lesion, ml").click()
            assert column.evaluate_all("cells => cells.map(cell => Number(cell.dataset.value))") == expected
        tab.locator("summary").first.click()
        canvas = tab.frame_locator("iframe").first.locator("canvas").first
        canvas.wait_for(state="visible", timeout=30_000)
        colours = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        while canvas.evaluate(colours) <= 20:  # the viewer draws after it has decoded its pictures
            tab.wait_for_timeout(100)
        browser.close()
    assert errors == [] and [url for url in requests if not url.startswith(("data:", "about:"))] == [page.as_uri()]
