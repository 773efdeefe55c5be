"""`diffusers-cf app` in headless Chromium: what a user sees, downloads and leaves behind."""

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffusers_cf.cli import main
from diffusers_cf.data.phantom import make_patient, write_patient
from diffusers_cf.loading import PRETRAINED


CI = bool(os.environ.get("CI"))  # there, what is missing is a failure
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "there is no Chromium (Debian: apt-get install chromium)"
needed = importlib.import_module if CI else pytest.importorskip
needed("gradio")
playwright = needed("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None and not CI, reason=NO_CHROMIUM)]
NAME, HEAT = "Surname-Firstname", "#cf-pictures .cf-heatmap .cf-overlay"
UPLOAD_MB = 8


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Two patients, ten slices around the lesion, named like people; each in a folder called by its number."""
    folder = tmp_path_factory.mktemp("patients")
    for index in (0, 1):
        made = make_patient(1, index)
        first = int(made.mask.sum(axis=(0, 1)).argmax()) - 5
        (folder / str(index)).mkdir()
        for path in write_patient(made, folder / "whole").iterdir():
            target = folder / str(index) / path.name.replace(made.patient, NAME)
            nib.save(nib.load(path).slicer[:, :, first : first + 10], target)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of an app behind a proxy, the folder where it may write, and its log; in the end nothing is left."""
    temporary, log = tmp_path_factory.mktemp("tmp"), tmp_path_factory.mktemp("log") / "log"
    with socket.create_server(("127.0.0.1", 0)) as proxy, open(log, "w") as stream:
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")
        proxies = dict.fromkeys(names, f"http://127.0.0.1:{proxy.getsockname()[1]}") | {"NO_PROXY": "", "no_proxy": ""}
        variables = {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **proxies}
        options = ["app", "--max_upload_mb", str(UPLOAD_MB), "--dtype", "float32"]
        command = [sys.executable, "-m", "diffusers_cf.cli", *options]
        process = subprocess.Popen(command, env=os.environ | variables, stdout=stream, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: " at http" in log.read_text() or process.poll() is not None)
            yield re.search(r" at (http://127\.0\.0\.1:\d+/)", log.read_text()).group(1), temporary, log
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        assert process.returncode == 143 and not list(temporary.iterdir())
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):  # the app has asked no other machine
            proxy.accept()


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, NO_CHROMIUM
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser):
    """Function that opens the app as a user of its own; afterwards, no page has asked another machine."""
    requests, contexts = [], []

    def open_page(width=1280, height=900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(server[0])
        page.wait_for_selector("#cf-files input[type=file]", state="attached", timeout=60000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests and [url for url in requests if not url.startswith((server[0], "data:", "blob:"))] == []
    wait_until(lambda: not files_of(server[1]))


def files_of(folder):
    """Files with content: gradio leaves empty ones beside uploads."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return [path for path in paths if path.exists() and path.stat().st_size]


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError("it never happened")


def drop(page, folder):
    page.set_input_files("#cf-files input[type=file]", sorted(folder.iterdir()))


def load(page, folder):
    drop(page, folder)
    page.wait_for_selector("#cf-message >> text=10 slices", timeout=60000)
    page.wait_for_selector(HEAT, timeout=60000)


def overlay(page):
    return page.eval_on_selector(HEAT, "image => image.src")


def wait_for_another_overlay(page, before):
    changed = f"before => {{const e = document.querySelector('{HEAT}'); return e && e.src !== before}}"
    page.wait_for_function(changed, arg=before, timeout=60000)


def move(page, slider, value):
    before, box = overlay(page), page.locator(f"#cf-{slider} input[type=number]")
    box.fill(str(value))
    box.press("Enter")
    wait_for_another_overlay(page, before)


def download(page, name, folder):
    with page.expect_download() as found:
        page.click(f"#cf-{name}")
    found.value.save_as(folder / found.value.suggested_filename)
    return nib.load(folder / f"{name}.nii.gz")


def test_from_files_to_files(open_page, patients, server, tmp_path):
    page = open_page()
    load(page, patients / "0")
    assert page.locator("#cf-pictures figure").count() == 4 and "10 slices" in page.inner_text("#cf-message")
    assert "Slice: unhealthy" in page.inner_text("#cf-verdict")
    for slider, value in (("guidance_scale", 4), ("index", 7), ("strength", 0.5)):
        move(page, slider, value)
    before = overlay(page)
    page.click("#cf-num_inference_steps input")
    page.get_by_role("option", name="10", exact=True).click()
    wait_for_another_overlay(page, before)
    before = overlay(page)
    page.get_by_label("t2", exact=True).check()
    page.wait_for_selector("#cf-pictures >> text=input (t2)")
    page.fill("#cf-threshold input[type=number]", "0.05")
    page.press("#cf-threshold input[type=number]", "Enter")
    page.wait_for_selector("#cf-verdict >> text=threshold of 0.05;")
    assert overlay(page) == before  # neither changes the heatmap

    page.click("#cf-volume")
    page.wait_for_selector("#cf-found .progress-text, #cf-found .progress-bar", timeout=30000)
    page.wait_for_selector("#cf-found .cf-verdict", timeout=200000)
    assert "guidance scale 4, strength 0.5, 10 steps, threshold 0.05" in page.inner_text("#cf-found")
    # the three planes are drawn, in colour where the heat is
    canvas = page.frame_locator(".cf-planes").locator("canvas").first
    page.locator(".cf-planes").scroll_into_view_if_needed(timeout=60000)
    colours = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((v, i, all) => i % 4 == 0 && v > all[i + 2] + 50).length"
    wait_until(lambda: canvas.evaluate(colours) > 50)
    segment = ["segment", patients / "0", "--model", PRETRAINED / "phantom_small", "--output", tmp_path / "out"]
    settings = "--guidance_scale 4 --strength 0.5 --num_inference_steps 10 --threshold 0.05 --dtype float32"
    assert main([*map(str, segment), *settings.split()]) == 0
    for name in ("heatmap", "mask"):
        ours, theirs = download(page, name, tmp_path), nib.load(tmp_path / "out" / "0" / f"{name}.nii.gz")
        assert ours.header == theirs.header and np.asanyarray(theirs.dataobj).any()
        assert np.array_equal(np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj))
    assert NAME not in server[2].read_text() and "Traceback" not in server[2].read_text()


def test_two_users_see_their_own_patient(open_page, patients, server):
    def scans():
        return {path.parent for path in files_of(server[1])}

    pages = [open_page(), open_page(390, 844)]
    for number, page in enumerate(pages):
        load(page, patients / str(number))
    first, second = map(overlay, pages)
    assert first != second and len(scans()) == 2
    pages[0].close()
    wait_until(lambda: len(scans()) == 1)
    move(pages[1], "guidance_scale", 4)
    assert overlay(pages[1]) not in (first, second)
    assert pages[1].evaluate("document.documentElement.scrollWidth") <= 390  # fits a phone


def test_it_opens_on_a_phantom_and_no_control_works_before(open_page):
    page = open_page()
    assert page.locator("#cf-volume").is_disabled() and page.locator("#cf-strength input[type=range]").is_disabled()
    page.wait_for_selector("#cf-message >> text=phantom 1, a simulated brain and no patient", timeout=120000)
    page.wait_for_selector(HEAT)
    assert page.locator("#cf-volume").is_enabled() and page.locator(".toast-message-text").count() == 0
    size = "image => image.getBoundingClientRect().width"
    small = page.eval_on_selector(HEAT, size)
    for scale in (2, 4, 1):  # a click on one picture zooms all
        page.click("#cf-pictures .cf-input .cf-image", position={"x": 20, "y": 20})
        assert page.eval_on_selector(HEAT, size) == pytest.approx(scale * small, rel=1e-3)
    page.get_by_label("phantom 3, no lesion").check()
    page.wait_for_selector("#cf-message >> text=phantom 3, no lesion, a simulated brain", timeout=120000)
    assert re.search(r"flair, t1, t1ce, t2: 4\d slices with content", page.inner_text("#cf-message"))
    assert "expert" in page.inner_text("#cf-pictures")


def test_a_file_above_the_limit_changes_nothing(open_page, patients, server, tmp_path):
    page = open_page()
    load(page, patients / "1")
    before, shown = set(files_of(server[1])), overlay(page)
    folder = shutil.copytree(patients / "1", tmp_path / "large")
    (folder / f"{NAME}_t1.nii.gz").write_bytes(bytes((UPLOAD_MB << 20) + 1))
    drop(page, folder)
    page.wait_for_selector(f".toast-message-text >> text={NAME}_t1.nii.gz", timeout=60000)
    assert set(files_of(server[1])) == before and overlay(page) == shown


def test_only_this_machine_and_only_its_own_files(server, open_page, patients):
    load(open_page(), patients / "0")
    scans = files_of(server[1])
    (served,) = server[1].glob("*/uploads")
    roundabout = f"{served}/../{scans[0].relative_to(served.parent)}"
    assert len(scans) == 5 and Path(roundabout).exists()
    for path in ("/etc/hostname", str(Path(__file__)), str(scans[0].parent), *map(str, scans), roundabout):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server[0]}gradio_api/file={path}")
        assert refused.value.code in (403, 404), path
    port = f"{int(server[0].split(':')[2].strip('/')):04X}"
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if f":{port} " in line]
    assert f"0100007F:{port}" in listening and f"00000000:{port}" not in listening
