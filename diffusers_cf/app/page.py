"""The page of `diffusers-cf app`: its components, and what happens when a user moves one. Imports gradio."""

import logging
import re
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path

import gradio as gr
from accelerate.utils.memory import should_reduce_batch_size

from diffusers_cf.app.explorer import Explorer
from diffusers_cf.app.html import message_html, slice_html, verdict_html, volume_html
from diffusers_cf.app.sessions import Sessions
from diffusers_cf.app.uploads import MAX_FILES, LimitedUploads, Limits, take_uploads
from diffusers_cf.data.intensity import unit_in_words
from diffusers_cf.data.phantom import make_patient, write_patient
from diffusers_cf.errors import InputError
from diffusers_cf.plots import HEAT_MAXIMUM


logger = logging.getLogger(__name__)

# Seed, index and whether with a tumour: patients of cohort 1, since the shipped model has seen cohort 0.
PHANTOMS = {"phantom 1": (1, 0, True), "phantom 2": (1, 1, True), "phantom 3, no lesion": (1, 2, False)}
SETTINGS = ("guidance_scale", "strength", "num_inference_steps", "threshold")
WELCOME = '<div class="cf-wait">Drop a patient’s NIfTI files above, or pick a phantom patient.</div>'
INTRODUCTION = """**What would this brain look like healthy?** What the model has to change is the lesion. Research
software, no medical device, not for clinical use. Files go to the machine that runs this page and nowhere else, and are
deleted when you leave."""

OUT_OF_MEMORY = "out of memory: try again when fewer patients are open here, or a smaller scan"

# Before anything travels: of a file above the server's own limits gradio says "Error" and nothing else.
_REFUSE_LARGE = """() => {
  const check = (event) => {
    const line = document.querySelector("#cf-limit .cf-message");
    line.hidden = true;
    if (!event.target.closest("#cf-files")) return;
    const files = [...((event.dataTransfer || event.target).files || [])];
    const large = files.find((file) => file.size > FILE_MB * 2 ** 20);
    const total = files.reduce((sum, file) => sum + file.size, 0) / 2 ** 20;
    const refusal =
      files.length > MAX_FILES ? `${files.length} files: more than the limit of MAX_FILES at a time` :
      large ? `${large.name}: larger than the limit of FILE_MB MB` :
      total > PATIENT_MB ? `${Math.floor(total)} MB in all: larger than the limit of PATIENT_MB MB` : "";
    if (!refusal) return;
    line.hidden = false;
    line.textContent = refusal;
    event.preventDefault();
    event.stopImmediatePropagation();
    event.target.value = "";
  };
  for (const kind of ["change", "drop"]) document.addEventListener(kind, check, true);
}"""


def refuse_large(limits: Limits) -> str:
    """The page's script that refuses what the server would."""
    values = {"MAX_FILES": MAX_FILES, "FILE_MB": limits.file_mb, "PATIENT_MB": limits.patient_mb}
    return re.sub("|".join(values), lambda match: str(values[match.group()]), _REFUSE_LARGE)


class Controls:
    """Ranges of the sliders, and settings from where they stand.

    Args:
        recommended: As from `pipe.resolve_settings()`.
        train_steps: Of the model; numbers of steps must divide it.
    """

    def __init__(self, recommended: Mapping, train_steps: int) -> None:
        self.recommended = dict(recommended)
        self.step_counts = [n for n in range(4, 101) if train_steps % n == 0]
        self.start = {
            "guidance_scale": round(recommended["guidance_scale"], 2),
            "strength": round(recommended["strength"], 2),
            "num_inference_steps": recommended["num_inference_steps"],
            "threshold": round(recommended["threshold"] or 0, 3),
        }

    def nearest_steps(self, steps: float) -> int:
        """The nearest number of steps into which the model's schedule can be divided."""
        return min([self.start["num_inference_steps"], *self.step_counts], key=lambda count: abs(count - steps))

    def settings(self, *values: float) -> dict:
        """Positions of the sliders, as in `SETTINGS`, as settings; one left where it was is exactly as recommended."""
        given = dict(zip(SETTINGS, values, strict=True))
        given["num_inference_steps"] = self.nearest_steps(given["num_inference_steps"])
        exact = {name: self.recommended[name] if value == self.start[name] else value for name, value in given.items()}
        return self.recommended | exact

    def sliders(self) -> list[gr.Slider]:
        """One for each of `SETTINGS`."""
        start = self.start
        ranges = {
            "guidance_scale": (0, max(20, 2 * start["guidance_scale"]), 0.5, "guidance scale"),
            "strength": (0.05, 1, 0.05, "strength"),
            "num_inference_steps": (4, max(25, 2 * start["num_inference_steps"]), 1, "steps"),
            "threshold": (0, max(HEAT_MAXIMUM, 2 * start["threshold"]), 0.001, "threshold"),
        }
        return [
            gr.Slider(
                low, high, value=start[name], step=step, label=label, elem_id=f"cf-{name}", min_width=140, interactive=True
            )
            for name, (low, high, step, label) in ranges.items()
        ]  # fmt: skip


def guarded(*otherwise) -> Callable:
    """A handler whose errors become one line, its first output, with `otherwise` for the other outputs.

    A message of any other error than ours could hold the name of a file: it is neither shown nor logged.
    """

    def decorate(handler: Callable) -> Callable:
        @wraps(handler)
        def run(*arguments):
            try:
                return handler(*arguments)
            except InputError as error:
                text = str(error)
            except Exception as error:
                if isinstance(error, MemoryError) or should_reduce_batch_size(error):
                    return [message_html(OUT_OF_MEMORY, is_error=True), *otherwise]
                kind, frames = type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
                logger.error("%s in %s\n%s", kind, handler.__name__, frames)
                text = f"a fault of this program ({kind}), nothing was changed"
            return [message_html(text, is_error=True), *otherwise]

        return run

    return decorate


class Handlers:
    """What the page calls: each returns a message and then components in the order of the page's outputs.

    Args:
        sessions: Whose patient is whose.
        open_explorer: Makes the explorer of a patient's folder.
        controls: Of the page.
        modalities: What the model takes.
        uploads: Where gradio puts what is uploaded, and how much that may be.
    """

    def __init__(
        self,
        sessions: Sessions,
        open_explorer: Callable[[Path], Explorer],
        controls: Controls,
        modalities: list[str],
        uploads: LimitedUploads,
    ) -> None:
        self.sessions, self.open_explorer, self.controls = sessions, open_explorer, controls
        self.modalities, self.uploads = modalities, uploads

    def take_files(self, paths, channel, guidance, strength, steps, threshold, request: gr.Request) -> list:
        """A patient that was dropped, and the drop zone and the phantoms cleared."""

        def fill(scans: Path) -> None:
            uploads = self.uploads
            take_uploads(paths or [], uploads.folder, self.modalities, scans, uploads.limits.patient_mb)

        return [*self._load(fill, channel, (guidance, strength, steps, threshold), request), None, None]

    def take_phantom(self, name, channel, guidance, strength, steps, threshold, request: gr.Request) -> list:
        """A bundled patient, made anew."""
        seed, index, tumour = PHANTOMS[name]

        def fill(scans: Path) -> None:
            folder = write_patient(make_patient(seed, index, tumour), scans)
            for path in folder.iterdir():
                path.rename(scans / path.name)
            folder.rmdir()

        return self._load(fill, channel, (guidance, strength, steps, threshold), request)

    def _load(self, fill: Callable[[Path], None], channel: str, values: tuple, request: gr.Request) -> list:
        """Message, slice slider, pictures, verdict, verdict on the volume, both downloads."""

        # nothing of an earlier patient stays on a page that was given another
        @guarded(gr.skip(), WELCOME, "", "", _hidden(), _hidden())
        def load():
            explorer = self.sessions.open(request.session_hash, fill, self.open_explorer)
            slices, index = explorer.slices, explorer.first_slice
            slider = gr.Slider(slices[0], slices[-1], value=index, step=1, interactive=True)
            try:
                pictures = self._pictures(explorer, index, channel, values)
            except BaseException:
                self.sessions.close(request.session_hash)
                raise
            return [self._summary(explorer), slider, *pictures, "", _hidden(), _hidden()]

        return load()

    def show(self, index, channel, guidance, strength, steps, threshold, request: gr.Request) -> list:
        """Message, steps, pictures and verdict of a slice."""

        @guarded(gr.skip(), gr.skip(), gr.skip())
        def show():
            explorer, nearest = self.sessions.get(request.session_hash), self.controls.nearest_steps(steps)
            pictures = self._pictures(explorer, int(index), channel, (guidance, strength, steps, threshold))
            return [self._summary(explorer), gr.skip() if nearest == steps else nearest, *pictures]

        return show()

    def _pictures(self, explorer: Explorer, index: int, channel: str, values: tuple) -> list[str]:
        settings = self.controls.settings(*values)
        view, unit = explorer.view(index, settings), unit_in_words(explorer.facts["preprocessing"]["normalize"])
        pictures = slice_html(view, self.modalities.index(channel), self.modalities, unit)
        return [pictures, verdict_html(view, settings["threshold"])]

    def segment(
        self, index, channel, guidance, strength, steps, threshold, request: gr.Request, progress=gr.Progress()  # noqa: B008
    ) -> list:  # fmt: skip
        """Message, pictures, verdict on the slice and on the volume, and both downloads."""

        @guarded(*[gr.skip()] * 5)
        def segment():
            explorer, values = self.sessions.get(request.session_hash), (guidance, strength, steps, threshold)
            progress(0, desc="whole volume")
            files = explorer.segment(
                self.controls.settings(*values), lambda share: progress(share, desc="whole volume")
            )
            downloads = [gr.DownloadButton(value=path, visible=True) for path in (files.heatmap, files.mask)]
            pictures = self._pictures(explorer, int(index), channel, values)
            return [self._summary(explorer), *pictures, volume_html(files), *downloads]

        return segment()

    def _summary(self, explorer: Explorer) -> str:
        """What stands above the pictures while there is no error: always the same, so that nothing jumps."""
        text = f"{', '.join(self.modalities)}: {len(explorer.slices)} slices with content"
        return message_html(". ".join([text, *explorer.warnings]))

    def leave(self, request: gr.Request) -> None:
        """The user is gone, and so is the patient."""
        self.sessions.close(request.session_hash)


def _hidden() -> gr.DownloadButton:
    return gr.DownloadButton(value=None, visible=False)


def build_page(handlers: Handlers) -> gr.Blocks:
    """The page; `launch` serves it."""
    names = handlers.modalities
    # what gradio itself keeps of an upload that never reached us goes after half an hour
    with gr.Blocks(title="diffusers_cf", analytics_enabled=False, delete_cache=(60, 1800), fill_width=True) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row(equal_height=True):
            dropped = gr.File(
                label=f"one patient’s {', '.join(names)} (.nii.gz)", file_count="multiple",
                elem_id="cf-files", height=90, scale=3, min_width=280,
            )  # fmt: skip
            # gradio's own way makes an empty file beside each upload, and leaves it
            dropped.preprocess = lambda payload: payload and [file.path for file in payload.root]
            phantom = gr.Radio(list(PHANTOMS), label="or a bundled phantom patient", elem_id="cf-phantom", scale=3)
        gr.HTML('<div class="cf-message cf-error" role="alert" hidden></div>', elem_id="cf-limit")
        message = gr.HTML(elem_id="cf-message")
        pictures = gr.HTML(WELCOME, elem_id="cf-pictures", min_height=160)
        verdict = gr.HTML(elem_id="cf-verdict")
        with gr.Row():
            index = gr.Slider(0, 1, step=1, label="slice (0 = lowest)", elem_id="cf-index", scale=3, min_width=280)
            channel = gr.Radio(names, value=names[0], label="modality", elem_id="cf-channel", scale=2, min_width=280)
        with gr.Row():
            sliders = handlers.controls.sliders()
        with gr.Row():
            volume = gr.Button("Whole volume", variant="primary", elem_id="cf-volume", min_width=150)
            heatmap = gr.DownloadButton("Download heatmap (NIfTI)", visible=False, elem_id="cf-heatmap", min_width=150)
            mask = gr.DownloadButton("Download mask (NIfTI)", visible=False, elem_id="cf-mask", min_width=150)
        found = gr.HTML(elem_id="cf-found", min_height=60)

        inputs, loaded = [channel, *sliders], [message, index, pictures, verdict, found, heatmap, mask]
        options = {"api_visibility": "private", "concurrency_id": "slice", "concurrency_limit": 2}
        loading = {**options, "show_progress_on": [pictures]}
        dropped.upload(handlers.take_files, [dropped, *inputs], [*loaded, dropped, phantom], **loading)
        phantom.input(handlers.take_phantom, [phantom, *inputs], loaded, **loading)
        gr.on(
            [component.input for component in (index, channel, *sliders)], handlers.show, [index, *inputs],
            [message, sliders[SETTINGS.index("num_inference_steps")], pictures, verdict],
            trigger_mode="always_last", show_progress="hidden", **options,
        )  # fmt: skip
        volume.click(
            handlers.segment, [index, *inputs], [message, pictures, verdict, found, heatmap, mask],
            show_progress_on=[found], **options | {"concurrency_id": "volume", "concurrency_limit": 1},
        )  # fmt: skip
        page.unload(handlers.leave)
    return page
