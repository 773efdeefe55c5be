"""A cohort of phantom patients, one of them damaged: `segment` is killed and run again, `report` opens in a browser."""

import json
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
DAMAGED = "P_06"  # the second run meets it, after the kill
NAMES = [name for name in (f"P_{index:02d}" for index in range(10)) if name != DAMAGED]
VOLUMES = {*(f"counterfactual_{name}.nii.gz" for name in MODALITIES), "heatmap.nii.gz", "mask.nii.gz"}


def command(*arguments):
    return [sys.executable, "-m", "diffusers_cf.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Ten patients, of each every 8th voxel of four slices through the lesion; one file is truncated."""
    folder = tmp_path_factory.mktemp("cohort")
    for index in range(10):
        made = make_patient(1, index % 2)  # making one takes seconds
        for path in write_patient(made, folder / "whole").iterdir():
            scan, first = nib.load(path), int(made.mask.sum(axis=(0, 1)).argmax()) - 8
            target = folder / "scans" / f"P_{index:02d}" / path.name.replace(made.patient, f"P_{index:02d}")
            target.parent.mkdir(parents=True, exist_ok=True)
            nib.save(scan.slicer[::8, ::8, first : first + 16 : 4], target)
    damaged = folder / "scans" / DAMAGED / f"{DAMAGED}_t1.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    return folder / "scans"


@pytest.fixture(scope="module")
def results(cohort, tmp_path_factory):
    """OUT of a command that was killed while it wrote its fifth patient, what it left, and the second run."""
    root = tmp_path_factory.mktemp("results")
    make_pipe().save_pretrained(root / "model")
    segment, out = command("segment", cohort, "--model", root / "model", "--output", root / "out"), root / "out"
    process = subprocess.Popen(segment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (len(list(out.glob("P_*"))) >= 4 and list(out.glob(".P_*.tmp-*"))):
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    left = sorted(path.name for path in out.iterdir())
    return out, left, subprocess.run(segment, capture_output=True, text=True)


def test_nine_whole_results_and_one_reason(results, cohort):
    out, left, again = results
    finished = sum(name.startswith("P_") for name in left)
    assert 4 <= finished < 9 and any(".tmp-" in name for name in left)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    (line,) = error_lines(again)
    assert f"{DAMAGED}_t1.nii.gz: truncated" in line
    assert f"{9 - finished} done, {finished} finished before, 1 failed" in again.stdout
    assert sorted(path.name for path in out.iterdir()) == [*NAMES, "summary.json"]
    for name in NAMES:
        assert {path.name for path in (out / name).iterdir()} == VOLUMES | {"preview.png", "report.json"}
        scan = nib.load(cohort / name / f"{name}_flair.nii.gz")
        assert all(nib.load(out / name / file).get_fdata().shape == scan.shape for file in VOLUMES)
        assert json.loads((out / name / "report.json").read_text())["patient"] == name
    summary = json.loads((out / "summary.json").read_text())
    assert summary["failed"] == 1 and "truncated" in summary["patients"][DAMAGED]["reason"]


@pytest.fixture(scope="module")
def page(results, cohort, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    subprocess.run(command("report", results[0], "--scans", cohort, "--output", path), check=True)
    return path


def test_the_page_loads_nothing_and_names_the_failed_patient(page):
    content = page.read_text()
    assert foreign_addresses(content) == []
    text = text_of(content)
    assert f"Not segmented: {DAMAGED}: " in text and text.count("Scroll through the volume") == 9


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
        order = "cells => cells.map(cell => Number(cell.dataset.value))"
        before = column.evaluate_all(order)
        assert len(before) == 9 and len(set(before)) > 1
        for expected in (sorted(before), sorted(before, reverse=True)):
            tab.get_by_role("button", name="Lesion, ml").click()
            assert column.evaluate_all(order) == expected
        tab.locator("summary").first.click()
        canvas = tab.frame_locator("iframe").first.locator("canvas").first
        canvas.wait_for(state="visible", timeout=30_000)
        colours = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        while canvas.evaluate(colours) <= 20:  # the viewer draws after it has decoded its pictures
            tab.wait_for_timeout(100)
        browser.close()
    assert errors == [] and [url for url in requests if not url.startswith(("data:", "about:"))] == [page.as_uri()]
