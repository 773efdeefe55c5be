"""A cohort of phantom patients, one of them damaged: `segment` is killed and run again, `report` opens in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import pytest
from segmentation_files import MODALITIES, error_lines, foreign_addresses, make_pipe, text_of

from diffusers_cf.data.phantom import make_patient, write_patient


pytest.importorskip("nilearn", reason="phantoms and viewers need nilearn")
pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DAMAGED = 6  # the second run meets it, after the kill
FILES = {*(f"counterfactual_{name}.nii.gz" for name in MODALITIES), "heatmap.nii.gz", "mask.nii.gz"}
FILES |= {"preview.png", "report.json"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Ten patients, of each every 8th voxel of four slices through the lesion; one file is cut off."""
    folder = tmp_path_factory.mktemp("cohort")
    for index in range(10):
        made = make_patient(1, index % 2)  # making one takes seconds
        for path in write_patient(made, folder / "whole").iterdir():
            scan, first = nib.load(path), int(made.mask.sum(axis=(0, 1)).argmax()) - 8
            target = folder / "scans" / f"P_{index:02d}" / path.name.replace(made.patient, f"P_{index:02d}")
            target.parent.mkdir(parents=True, exist_ok=True)
            nib.save(scan.slicer[::8, ::8, first : first + 16 : 4], target)
    damaged = folder / "scans" / f"P_{DAMAGED:02d}" / f"P_{DAMAGED:02d}_t1.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    return folder / "scans"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipe().save_pretrained(folder)
    return folder


def command(*arguments):
    return [sys.executable, "-m", "diffusers_cf.cli", *map(str, arguments)]


def kill_when(process, is_reached):
    for _ in range(3000):
        if is_reached():
            process.send_signal(signal.SIGKILL)
            return process.wait(30)
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.02)
    raise AssertionError("never came so far")


@pytest.fixture(scope="module")
def results(cohort, model, tmp_path_factory):
    """OUT of a command that was killed at work on its fifth patient, and what its second run said."""
    out = tmp_path_factory.mktemp("results") / "out"
    segment = command("segment", cohort, "--model", model, "--output", out)
    process = subprocess.Popen(segment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # as soon as the fifth patient's folder is half written
    code = kill_when(process, lambda: len(list(out.glob("P_*"))) >= 4 and list(out.glob(".P_*.tmp-*")))
    assert code == -signal.SIGKILL
    left = sorted(path.name for path in out.iterdir())
    again = subprocess.run(segment, capture_output=True, text=True)
    return out, left, again


def test_nine_whole_results_and_one_reason(results, cohort):
    out, left, again = results
    assert 4 <= sum(name.startswith("P_") for name in left) < 9 and any(".tmp-" in name for name in left)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    (line,), damaged = error_lines(again), f"P_{DAMAGED:02d}"
    assert f"{damaged}_t1.nii.gz: truncated" in line
    finished = sum(name.startswith("P_") for name in left)
    assert f"{9 - finished} done, {finished} finished before, 1 failed" in again.stdout
    names = [f"P_{index:02d}" for index in range(10) if index != DAMAGED]
    assert sorted(path.name for path in out.iterdir()) == [*names, "summary.json"]
    for name in names:
        assert {path.name for path in (out / name).iterdir()} == FILES
        scan = nib.load(cohort / name / f"{name}_flair.nii.gz")
        for file in FILES - {"preview.png", "report.json"}:
            written = nib.load(out / name / file)
            assert written.shape == scan.shape and written.get_fdata().shape == scan.shape
        assert json.loads((out / name / "report.json").read_text())["patient"] == name
    summary = json.loads((out / "summary.json").read_text())
    assert summary["failed"] == 1 and "truncated" in summary["patients"][damaged]["reason"]


@pytest.fixture(scope="module")
def page(results, cohort, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    done = subprocess.run(
        command("report", results[0], "--scans", cohort, "--output", path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"9 patients, 0 failed -> {path}\n"
    return path


def test_one_page_needs_nothing_from_elsewhere_and_names_the_failed_one(page):
    content = page.read_text()
    assert foreign_addresses(content) == [] and os.listdir(page.parent) == ["report.html"]
    text = text_of(content)
    assert re.search(rf"Not segmented: .*P_{DAMAGED:02d}_t1\.nii\.gz: truncated", text)
    assert text.count("Scroll through the volume") == 9


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium)")
def test_the_page_in_a_browser_without_network(page):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    requests, errors = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_context(offline=True).new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.goto(page.as_uri())
        column = tab.locator("#patients tbody tr td:nth-child(2)")

        def volumes():
            return [float(value) for value in column.evaluate_all("cells => cells.map(cell => cell.dataset.value)")]

        before = volumes()
        assert len(before) == 9 and len(set(before)) > 1
        for order in (sorted(before), sorted(before, reverse=True)):
            tab.get_by_role("button", name="Lesion, ml").click()
            assert volumes() == order
        tab.locator("summary").first.click()
        viewer = tab.frame_locator("iframe").first
        viewer.locator("canvas").first.wait_for(state="visible", timeout=30_000)
        colours = (
            "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
        )
        for _ in range(100):
            if viewer.locator("canvas").first.evaluate(colours) > 20:
                break
            tab.wait_for_timeout(100)
        assert viewer.locator("canvas").first.evaluate(colours) > 20, "the viewer shows nothing"
        browser.close()
    assert errors == [] and [url for url in requests if not url.startswith(("data:", "about:"))] == [page.as_uri()]
