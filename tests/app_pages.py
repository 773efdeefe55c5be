"""What the tests of the app in headless Chromium share: the app as a process, a page of it, and patients to drop there."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import nibabel as nib
import pytest

from diffusers_cf.data.phantom import make_patient, write_patient


# Where tests must not be skipped unseen: there what is missing fails them.
CI = bool(os.environ.get("CI"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "there is no Chromium (Debian: apt-get install chromium)"
MARKS = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None and not CI, reason=NO_CHROMIUM)]
NAME = "Surname-Firstname"
HEAT = "#cf-pictures .cf-heatmap .cf-overlay"
MASK = "#cf-pictures .cf-mask .cf-overlay"


def needed(module):
    """A module; the tests that import it here are skipped where it is missing, but not in CI."""
    return importlib.import_module(module) if CI else pytest.importorskip(module)


def write_patients(folder):
    """Two patients, ten slices each round the lesion, named like people; the folder of each by its number."""
    for index in (0, 1):
        made = make_patient(1, index)
        first = int(made.mask.sum(axis=(0, 1)).argmax()) - 5
        for path in write_patient(made, folder / "whole").iterdir():
            scan = nib.load(path)
            target = folder / str(index) / path.name.replace(made.patient, NAME)
            target.parent.mkdir(exist_ok=True)
            nib.save(scan.slicer[:, :, first : first + 10], target)
    return folder


@contextmanager
def running_app(temporary, log, *options, **environment):
    """The address of an app and its process; stopped as an operating system stops it, and then nothing is left."""
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"} | environment
    command = [sys.executable, "-m", "diffusers_cf.cli", "app", *options]
    with open(log, "w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            if match := re.search(r" at (http://127\.0\.0\.1:\d+/)", log.read_text()):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield match.group(1), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 143 and not list(temporary.iterdir()), "something outlasts the app"


@contextmanager
def chromium():
    """A browser."""
    assert CHROMIUM, NO_CHROMIUM
    with needed("playwright.sync_api").sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def pages(browser, address):
    """Function that opens the app as a user of its own; afterwards, none of them has asked any other machine."""
    requests, contexts = [], []

    def open_page(width=1280, height=900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector("#cf-files input[type=file]", state="attached", timeout=60000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests and [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def drop(page, folder):
    page.set_input_files("#cf-files input[type=file]", sorted(folder.iterdir()))


def overlay(page, selector=HEAT):
    return page.eval_on_selector(selector, "image => image.src")


def move(page, slider, value, selector=HEAT):
    """Moves a slider; gives the seconds until there is another overlay."""
    before, start = overlay(page, selector), time.perf_counter()
    box = page.locator(f"#cf-{slider} input[type=number]")
    box.fill(str(value))
    box.press("Enter")
    changed = f"before => {{const e = document.querySelector('{selector}'); return e && e.src !== before}}"
    page.wait_for_function(changed, arg=before, timeout=60000)
    return time.perf_counter() - start
