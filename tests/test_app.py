"""`diffusers-cf app` in headless Chromium: a phantom in, sliders, files out that are those of `segment`; bad uploads."""

import gzip
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffusers_cf.cli import main
from diffusers_cf.data.phantom import make_patient, write_patient
from diffusers_cf.demo import SHIPPED_MODEL


pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium)"),
]
NAME = "Surname-Firstname"
HEAT = "#cf-pictures .cf-heatmap .cf-overlay"
UPLOAD_MB = 8


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Two patients, ten slices each round the lesion, named like people; the folder of each by its number."""
    folder = tmp_path_factory.mktemp("patients")
    for index in (0, 1):
        made = make_patient(1, index)
        first = int(made.mask.sum(axis=(0, 1)).argmax()) - 5
        for path in write_patient(made, folder / "whole").iterdir():
            scan = nib.load(path)
            target = folder / str(index) / path.name.replace(made.patient, NAME)
            target.parent.mkdir(exist_ok=True)
            nib.save(scan.slicer[:, :, first : first + 10], target)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of an app, the folder where it may write, and its log; stopped as an operating system stops it."""
    temporary, log = tmp_path_factory.mktemp("tmp"), tmp_path_factory.mktemp("log") / "log"
    # one thread: beside other tests two would wait for each other
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "diffusers_cf.cli",
        "app",
        "--max_upload_mb",
        str(UPLOAD_MB),
        "--dtype",
        "float32",
    ]
    with open(log, "w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            if match := re.search(r" at (http://127\.0\.0\.1:\d+/)", log.read_text()):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield match.group(1), temporary, log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 0 and not list(temporary.iterdir()), "something outlasts the app"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser):
    """Function that opens the app as a user of its own; afterwards, none of them has asked any other machine."""
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


def drop(page, folder):
    page.set_input_files("#cf-files input[type=file]", sorted(folder.iterdir()))


def overlay(page):
    return page.eval_on_selector(HEAT, "image => image.src")


def move(page, slider, value):
    """Moves a slider; gives the seconds until there is another heatmap."""
    before, start = overlay(page), time.perf_counter()
    box = page.locator(f"#cf-{slider} input[type=number]")
    box.fill(str(value))
    box.press("Enter")
    changed = f"before => {{const e = document.querySelector('{HEAT}'); return e && e.src !== before}}"
    page.wait_for_function(changed, arg=before, timeout=60000)
    return time.perf_counter() - start


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def wait_until(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError("it never happened")


def download(page, name, folder):
    with page.expect_download() as found:
        page.click(f"#cf-{name}")
    found.value.save_as(folder / found.value.suggested_filename)
    return nib.load(folder / f"{name}.nii.gz")


def test_from_files_to_files(open_page, patients, server, tmp_path):
    page = open_page()
    drop(page, patients / "0")
    page.wait_for_selector(HEAT, timeout=60000)
    assert page.locator("#cf-pictures figure").count() == 4 and page.locator(".cf-error:visible").count() == 0
    assert "10 slices with content" in page.inner_text("#cf-message")
    threshold = json.loads((SHIPPED_MODEL / "preprocessing.json").read_text())["settings"]["threshold"]
    verdict = rf"Slice: unhealthy · [\d.]+ cm² at or above the threshold of {threshold:.3g}; score 0.\d{{4}}"
    assert re.search(verdict, page.inner_text("#cf-verdict"))

    seconds = [move(page, "guidance_scale", value) for value in (5, 9, 4)]
    print("seconds from slider to overlay:", *(f"{value:.2f}" for value in seconds))
    assert min(seconds) < 3
    for slider, value in (("index", 7), ("strength", 0.5), ("num_inference_steps", 11)):
        move(page, slider, value)
    assert page.input_value("#cf-num_inference_steps input[type=number]") == "10"  # 11 does not divide 1000
    before = overlay(page)
    page.get_by_label("t2", exact=True).check()
    page.wait_for_selector("#cf-pictures >> text=input (t2)")
    page.fill("#cf-threshold input[type=number]", "0.05")
    page.press("#cf-threshold input[type=number]", "Enter")
    page.wait_for_selector("#cf-verdict >> text=threshold of 0.05;")
    assert overlay(page) == before  # neither changes the heat

    page.click("#cf-volume")
    page.wait_for_selector("#cf-found .progress-text, #cf-found .progress-bar", timeout=30000)
    page.wait_for_selector("#cf-found .cf-verdict", timeout=200000)
    assert re.search(r"[\d.]+ ml in slices 0 to \d+; Dice .* \(guidance scale 4, strength 0.5, 10 steps, threshold 0.05\)", page.inner_text("#cf-found"))  # fmt: skip
    assert "mask, whole volume" in page.inner_text("#cf-pictures")
    segment = ["segment", str(patients / "0"), "--model", str(SHIPPED_MODEL), "--output", str(tmp_path / "out")]
    settings = "--guidance_scale 4 --strength 0.5 --num_inference_steps 10 --threshold 0.05 --dtype float32"
    assert main([*segment, *settings.split()]) == 0
    for name in ("heatmap", "mask"):
        ours, theirs = download(page, name, tmp_path), nib.load(tmp_path / "out" / "0" / f"{name}.nii.gz")
        assert ours.header == theirs.header and np.asanyarray(theirs.dataobj).any()
        assert np.array_equal(np.asanyarray(ours.dataobj), np.asanyarray(theirs.dataobj))
    page.close()
    wait_until(lambda: not files_of(server[1]))
    assert NAME not in server[2].read_text() and "Traceback" not in server[2].read_text()


def test_two_users_see_their_own_patient(open_page, patients, server):
    pages = [open_page(), open_page(390, 844)]
    for number, page in enumerate(pages):
        drop(page, patients / str(number))
    for page in pages:
        page.wait_for_selector(HEAT, timeout=60000)
    first, second = map(overlay, pages)
    assert first != second and len(list(server[1].glob("*/sessions/*"))) == 2
    pages[0].close()
    wait_until(lambda: len(list(server[1].glob("*/sessions/*"))) == 1)
    move(pages[1], "guidance_scale", 4)
    assert overlay(pages[1]) not in (first, second)
    # on a phone nothing needs a finger from side to side
    assert pages[1].evaluate("document.documentElement.scrollWidth") <= 390
    pages[1].close()
    wait_until(lambda: not files_of(server[1]))


def test_a_bundled_phantom(open_page):
    page = open_page()
    page.get_by_label("phantom 3, no lesion").check()
    page.wait_for_selector(HEAT, timeout=120000)
    assert re.search(r"flair, t1, t1ce, t2: 4\d slices with content", page.inner_text("#cf-message"))
    assert "expert" in page.inner_text("#cf-pictures") and "Dice" not in page.inner_text("body")


def test_no_slider_without_a_patient(open_page):
    page = open_page()
    page.fill("#cf-strength input[type=number]", "0.5")
    page.press("#cf-strength input[type=number]", "Enter")
    page.wait_for_selector("#cf-message >> text=no patient is loaded")


def damage_header(path):
    header = bytearray(nib.load(path).header.binaryblock + bytes(4))
    struct.pack_into("<4h", header, 40, 3, 32000, 32000, 32000)
    path.write_bytes(gzip.compress(bytes(header)))


def with_nan(path):
    scan = nib.load(path)
    voxels = scan.get_fdata(dtype=np.float32)
    voxels[60, 60, 5] = np.nan
    nib.save(nib.Nifti1Image(voxels, scan.affine), path)


def change_wrong_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


BAD = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), f"{NAME}_t1.nii.gz: truncated"),
    "damaged": (change_wrong_byte, f"{NAME}_t1.nii.gz: damaged gzip stream"),
    "missing": (lambda path: path.unlink(), "modality missing: t1 (names end in t1: t1, t1n, t1w)"),
    "one too many": (lambda path: shutil.copy(path, path.with_name("x_t1w.nii.gz")), "several files are t1"),
    "another kind": (lambda path: path.rename(path.with_name("x_adc.nii.gz")), "ends in none of flair, t1, t1ce, t2"),
    "NaN": (with_nan, f"{NAME}_t1.nii.gz: 1 of 163840 voxels are NaN or infinite"),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(999)), "not a single-file NIfTI image"),
    "a picture's name": (lambda path: path.rename(path.with_name("t1.png")), "t1.png: not a NIfTI file by its name"),
    "huge header": (damage_header, f"{NAME}_t1.nii.gz: its header asks for 65536000000352 bytes"),
    "empty": (lambda path: path.write_bytes(b""), f"{NAME}_t1.nii.gz: not a NIfTI file: only 0 bytes"),
    "bomb": (
        lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(UPLOAD_MB << 20))),
        f"{NAME}_t1.nii.gz: more than {UPLOAD_MB << 20} bytes after decompression",
    ),
    "too large": (lambda path: path.write_bytes(bytes((UPLOAD_MB << 20) + 1)), f"larger than the limit of {UPLOAD_MB} MB"),
}  # fmt: skip


def test_bad_uploads_are_one_line_and_nothing_is_kept(open_page, patients, server, tmp_path):
    page = open_page()
    drop(page, patients / "1")
    page.wait_for_selector(HEAT, timeout=60000)
    for kind, (damage, message) in BAD.items():
        folder = shutil.copytree(patients / "1", tmp_path / kind)
        damage(folder / f"{NAME}_t1.nii.gz")
        page.get_by_label("flair", exact=True).check()
        page.evaluate("document.querySelectorAll('.cf-message').forEach(line => line.textContent = '')")
        drop(page, folder)
        page.wait_for_function(
            "[...document.querySelectorAll('.cf-error')].some(line => !line.hidden && line.textContent)", timeout=60000
        )
        texts = [text for text in page.locator(".cf-error:visible").all_inner_texts() if text]
        assert len(texts) == 1 and message in texts[0] and "\n" not in texts[0], (kind, texts)
        assert "/" not in texts[0] and "Traceback" not in page.inner_text("body"), kind
        if kind != "too large":  # that one never left the browser
            assert not files_of(server[1]) and page.locator(HEAT).count() == 0, kind
    log = server[2].read_text()
    assert NAME not in log and "Traceback" not in log


def test_only_this_machine_and_only_its_own_files(server, open_page, patients):
    import urllib.error
    import urllib.request

    page = open_page()
    drop(page, patients / "0")
    page.wait_for_selector(HEAT, timeout=60000)
    (kept,) = server[1].glob("*/sessions/*/scans")
    for path in ("/etc/hostname", str(Path(__file__)), str(kept)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server[0]}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    port = f"{int(server[0].split(':')[2].strip('/')):04X}"
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if f":{port} " in line]
    assert f"0100007F:{port}" in listening and f"00000000:{port}" not in listening
