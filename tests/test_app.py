"""`diffusers-cf app` in headless Chromium: a phantom in, sliders, files out that are those of `segment`; bad uploads."""

import gzip
import json
import os
import re
import shutil
import socket
import struct
import time
import urllib.error
import urllib.request
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from app_pages import HEAT, MARKS, NAME, chromium, drop, move, needed, overlay, pages, running_app, write_patients

from diffusers_cf.cli import main
from diffusers_cf.commands.demo import SHIPPED_MODEL


needed("gradio")
needed("playwright.sync_api")
pytestmark = MARKS
UPLOAD_MB, PATIENT_MB = 8, 16


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("patients"))


@pytest.fixture(scope="module")
def elsewhere():
    """A proxy for whatever the app might ask another machine for; nobody has come in the end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.fixture(scope="module")
def server(tmp_path_factory, elsewhere):
    """The address of an app, the folder where it may write, and its log."""
    temporary, log = tmp_path_factory.mktemp("tmp"), tmp_path_factory.mktemp("log") / "log"
    proxies = {name: elsewhere for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")}
    proxies |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    limits = ("--max_upload_mb", str(UPLOAD_MB), "--max_patient_mb", str(PATIENT_MB))
    # one thread: beside other tests two would wait for each other
    with running_app(temporary, log, *limits, "--dtype", "float32", OMP_NUM_THREADS="1", **proxies) as (address, _):
        yield address, temporary, log


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(server, browser):
    with pages(browser, server[0]) as open_page:
        yield open_page


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

    for slider, value in (("guidance_scale", 4), ("index", 7), ("strength", 0.5), ("num_inference_steps", 11)):
        move(page, slider, value)
    assert page.input_value("#cf-num_inference_steps input[type=number]") == "10"  # 11 does not divide 1000
    before = overlay(page)
    page.get_by_label("t2", exact=True).check()
    page.wait_for_selector("#cf-pictures >> text=input (t2)")
    page.fill("#cf-threshold input[type=number]", "0.05")
    page.press("#cf-threshold input[type=number]", "Enter")
    page.wait_for_selector("#cf-verdict >> text=threshold of 0.05;")
    assert overlay(page) == before  # neither changes the heat

    assert "10 slices with content" in page.inner_text("#cf-message")  # nothing jumps while sliders move
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


def many(path):
    for number in range(17):
        (path.parent / f"{number}_t1.nii.gz").touch()


def heavy(path):
    for number in range(3):
        (path.parent / f"{number}_t1.nii").write_bytes(bytes(6 << 20))


def many_voxels(path):
    for scan in path.parent.iterdir():
        nib.save(nib.Nifti1Image(np.ones((128, 128, 75), np.uint8), np.eye(4)), scan)


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
    "too many": (many, "22 files: more than the limit of 16 at a time"),
    "too much": (heavy, f"18 MB in all: larger than the limit of {PATIENT_MB} MB"),
    "voxels": (many_voxels, f"{NAME}_flair.nii.gz: 1228800 voxels (shape (128, 128, 75)), the limit is 1048576"),
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
        if not kind.startswith("too"):  # that one never left the browser
            assert not files_of(server[1]) and page.locator(HEAT).count() == 0, kind
    log = server[2].read_text()
    assert NAME not in log and "Traceback" not in log


def test_only_this_machine_and_only_its_own_files(server, open_page, patients):
    page = open_page()
    drop(page, patients / "0")
    page.wait_for_selector(HEAT, timeout=60000)
    scans = [path for path in files_of(server[1]) if path.parent.name == "scans"]
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


def post(server, length, content):
    """Sends the head of an upload that says how long it is, and some content."""
    host, port = re.search(r"//(.*):(\d+)", server[0]).groups()
    head = f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{NAME}_t1.nii"\r\n\r\n'
    connection = socket.create_connection((host, int(port)), timeout=60)
    start = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n"
    kind = "Content-Type: multipart/form-data; boundary=cut\r\n\r\n"
    connection.sendall((start + kind + head).encode() + content)
    return connection


def test_an_upload_that_breaks_off_is_swept_away(server, open_page, patients):
    def partial():
        return [path for path in files_of(server[1]) if path.parent.name == "uploads"]

    with post(server, 4 << 20, bytes(1 << 20)):
        wait_until(lambda: partial() and partial()[0].stat().st_size >= 1 << 19)
    (left,) = partial()
    # what another user has just begun is no business of one who drops files
    page = open_page()
    drop(page, patients / "0")
    page.wait_for_selector(HEAT, timeout=60000)
    page.close()
    wait_until(lambda: files_of(server[1]) == [left])
    os.utime(left, (time.time() - 600,) * 2)
    wait_until(lambda: not files_of(server[1]))
    assert NAME not in server[2].read_text() and "Traceback" not in server[2].read_text()


def test_an_upload_above_the_limit_is_refused_before_it_comes(server):
    with post(server, (PATIENT_MB + 2) << 20, b"") as connection:
        answer = connection.makefile("rb").read().decode()
    assert " 413 " in answer and f"larger than the limit of {PATIENT_MB} MB" in answer and not files_of(server[1])
