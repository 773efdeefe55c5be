"""`diffusers-cf app`: serve a page on which a user looks at patients with a model."""

import argparse
import logging
import os
import tempfile
import urllib.request
from pathlib import Path

from diffusers_cf.commands.options import MODEL, add_convention_argument, add_device_arguments
from diffusers_cf.errors import InputError


SESSIONS = 8  # browser sessions that keep a patient; a further one replaces the least recently used


def add_app_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diffusers-cf app`."""
    add = parser.add_argument
    add("--model", help=f"{MODEL}; default: phantom_small")
    add("--host", default="127.0.0.1", help="address to listen on; default: %(default)s, for this machine only")
    add("--port", type=int, help="port to listen on, 1 to 65535; default: the first free port from 7860")
    add(
        "--max_upload_mb",
        type=int,
        default=256,
        help="limit for a file in MB, also decompressed; default: %(default)s",
    )
    add_convention_argument(parser)
    add_device_arguments(parser)


def run_app(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C, then delete all files of its users."""
    if args.max_upload_mb < 1 or not (args.port is None or 0 < args.port < 65536):
        raise InputError("--max_upload_mb must be 1 or more, --port from 1 to 65535")
    from diffusers_cf.inference import check_device_arguments, open_pipeline

    check_device_arguments(args)
    model, max_bytes = args.model or "phantom_small", args.max_upload_mb << 20
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # gradio asks its own server whether it runs; a proxy of the environment could not reach it
    os.environ["no_proxy"] = f"{urllib.request.getproxies().get('no', '')},127.0.0.1,localhost,{args.host}"
    with tempfile.TemporaryDirectory(prefix="diffusers_cf_app_", ignore_cleanup_errors=True) as folder:
        root = Path(folder).resolve()
        (root / "uploads").mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
        try:
            import gradio
        except ImportError:
            raise InputError('app needs gradio: pip install "gradio>=6.31"') from None
        from diffusers_cf.app.html import CSS
        from diffusers_cf.app.page import Page
        from diffusers_cf.segmentation.patient import segmentation_facts

        pipe = open_pipeline(model, args.device, args.dtype)
        # others may see the page: only the last part of the model's path
        facts = segmentation_facts(pipe, model=Path(model).name, needs_threshold=False)
        logging.getLogger("diffusers_cf").setLevel(logging.ERROR)  # warnings name patients' files; the page shows them
        page = Page(pipe, facts, root, args.batch_size, max_bytes, args.convention).blocks
        theme = gradio.themes.Base(spacing_size="sm", font=["system-ui", "sans-serif"], font_mono=["ui-monospace"])
        try:
            _, url, _ = page.launch(
                server_name=args.host, server_port=args.port, max_file_size=max_bytes, theme=theme, css=CSS,
                state_session_capacity=SESSIONS, share=False, prevent_thread_lock=True, quiet=True, footer_links=[],
                run_history=False, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
            )  # fmt: skip
            print(f"{model} at {url} (stop by Ctrl-C)", flush=True)
            page.block_thread()
        finally:
            page.close(verbose=False)
