"""`diffusers-cf app`: a page to look at patients with a model, on this machine alone unless told otherwise."""

import argparse
import logging
import os
import signal
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from diffusers_cf.app.explorer import Explorer
from diffusers_cf.app.html import CSS
from diffusers_cf.app.sessions import Sessions
from diffusers_cf.app.uploads import LimitedUploads, Limits
from diffusers_cf.commands.demo import SHIPPED_MODEL
from diffusers_cf.commands.options import add_device_arguments
from diffusers_cf.errors import InputError
from diffusers_cf.segmentation.patient import segmentation_facts


HOST = "127.0.0.1"
UPLOAD_MB, PATIENT_MB = 256, 512
PATIENTS = 8  # kept at a time: with the limit of one, of all
SWEEP_SECONDS = 10
SERVED = "uploads"


def add_app_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffusers-cf app`."""
    add = parser.add_argument
    add("--model", default=SHIPPED_MODEL.name, help="name, folder or Hub id of a model (%(default)s)")
    add("--host", default=HOST, help="address to listen at, %(default)s = this machine alone; 0.0.0.0 = everybody")
    add("--port", type=int, help="default: the first free one from 7860 on")
    add("--max_upload_mb", type=int, default=UPLOAD_MB, help="limit for a file, packed and unpacked, %(default)s")
    text = (
        f"limit for a patient's files and for the scans in memory, %(default)s; {PATIENTS} patients are kept at most"
    )
    add("--max_patient_mb", type=int, default=PATIENT_MB, help=text)
    add_device_arguments(parser)


def run_app(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted, then deletes what users have left.

    Raises:
        InputError: gradio is missing, an option is out of range, or the address is taken.
    """
    from diffusers_cf.inference import check_device_arguments, open_pipeline

    if min(args.max_upload_mb, args.max_patient_mb) < 1 or not (args.port is None or 0 < args.port < 65536):
        raise InputError("--max_upload_mb and --max_patient_mb must be 1 or more, --port from 1 to 65535")
    check_device_arguments(args)
    limits = Limits(args.max_upload_mb, args.max_patient_mb, PATIENTS * args.max_patient_mb)
    with _private_folder() as folder, _quiet_log():
        _prepare_gradio()
        pipe = open_pipeline(args.model, args.device, args.dtype)
        # under the name of the folder: the page may be shown to others
        facts = segmentation_facts(pipe, model=Path(args.model).name, needs_threshold=False)

        def open_explorer(own: Path) -> Explorer:
            sizes = {"max_bytes": limits.file_mb << 20, "max_memory": limits.patient_mb << 20}
            return Explorer(pipe, facts, own, args.batch_size, **sizes, served=folder / SERVED)

        sessions = Sessions(folder / "sessions", PATIENTS)
        try:
            _serve(pipe, facts, open_explorer, sessions, LimitedUploads(folder / SERVED, limits), args)
        finally:
            sessions.close_all()


def _prepare_gradio() -> None:
    """Imports gradio so that it calls nobody.

    Raises:
        InputError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError('app needs gradio: pip install "diffusers_cf[app]"') from None


@contextmanager
def _private_folder():
    """A temporary folder for all that gradio and users write; it goes at the end, also of a process that is stopped.

    Gradio serves any file below its own folder, `SERVED` in it, to whoever knows its name: patients lie beside that.
    """

    def stop(*_):
        raise KeyboardInterrupt

    before, is_main = os.environ.get("GRADIO_TEMP_DIR"), threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, stop) if is_main else None
    with tempfile.TemporaryDirectory(prefix="diffusers_cf_app_", ignore_cleanup_errors=True) as folder:
        folder = Path(folder).resolve()
        (folder / SERVED).mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(folder / SERVED)
        try:
            yield folder
        finally:
            if is_main:
                signal.signal(signal.SIGTERM, handler)
            del os.environ["GRADIO_TEMP_DIR"]
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def _quiet_log():
    """Keeps warnings about files, which name them, out of the log: the page of the user who has caused one shows it."""
    logger, handler = logging.getLogger("diffusers_cf"), logging.NullHandler()
    faults = logging.getLogger("diffusers_cf.app.page")
    spoken = logging.StreamHandler()
    logger.addHandler(handler)
    faults.addHandler(spoken)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(handler)
        faults.removeHandler(spoken)


def _serve(
    pipe, facts: dict, open_explorer, sessions: Sessions, uploads: LimitedUploads, args: argparse.Namespace
) -> None:
    import gradio
    from starlette.middleware import Middleware

    from diffusers_cf.app.page import Controls, Handlers, build_page, refuse_large

    controls = Controls(facts["settings"], pipe.scheduler.config.num_train_timesteps)
    modalities, limits = facts["preprocessing"]["modalities"], uploads.limits
    page = build_page(Handlers(sessions, open_explorer, controls, modalities, uploads))
    theme = gradio.themes.Base(
        spacing_size="sm", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, url, _ = page.launch(
            server_name=args.host, server_port=args.port, max_file_size=limits.file_mb << 20, theme=theme, css=CSS,
            js=refuse_large(limits), app_kwargs={"middleware": [Middleware(uploads)]}, share=False, prevent_thread_lock=True, quiet=True, footer_links=[], run_history=False, ssr_mode=False,
            enable_monitoring=False, pwa=False, mcp_server=False,
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"--host {args.host}, --port {args.port or 'auto'}: can't listen there ({error})") from None
    print(f"{args.model} at {url} (stop by Ctrl-C)", flush=True)
    stopped = threading.Event()
    try:
        while not stopped.wait(SWEEP_SECONDS):
            sessions.close_idle()
            uploads.sweep()
    except KeyboardInterrupt:
        pass
    finally:
        page.close()
