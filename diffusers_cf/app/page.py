"""The page of `diffusers-cf app`: its components and what happens when a user moves one. Imports gradio."""

import re
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr
from accelerate.utils.memory import should_reduce_batch_size

from diffusers_cf.app.explorer import Explorer
from diffusers_cf.app.html import ZOOM, planes_html, slice_html, verdict_html, volume_html
from diffusers_cf.app.uploads import take_scans
from diffusers_cf.data.intensity import unit_in_words
from diffusers_cf.data.nifti import MAX_BYTES, MODALITIES, canonical_modality
from diffusers_cf.data.phantom import make_patient, write_patient
from diffusers_cf.errors import InputError, in_one_line
from diffusers_cf.plots import HEAT_MAXIMUM
from diffusers_cf.segmentation.cohorts import patient_files, scans_among


# Seed, index and whether with a tumour: patients of cohort 1, because the shipped model was trained on cohort 0. The page
# opens on the first, whose lesion both shipped models see.
PHANTOMS = {"phantom 1": (1, 1, True), "phantom 2": (1, 0, True), "phantom 3, no lesion": (1, 2, False)}
SETTINGS = ("guidance_scale", "strength", "num_inference_steps", "threshold")  # in the order of the controls
PROGRESS = gr.Progress()  # as a default it asks gradio for the progress of the event
SECONDS_KEPT = 2 * 3600  # of a patient, after loading
START = "Drop a patient’s scans above, together or one by one, or choose a phantom."
INTRODUCTION = """**What would this brain look like healthy?** What the model has to change is the lesion. Research
software, not a medical device, not for clinical use. Files go only to the machine that runs this page and are deleted when
you leave it."""


class Page:
    """The page and the handlers of its events; `blocks` is what gradio serves.

    Each browser session has one `Explorer`, kept in a `gr.State` and closed when the user leaves.

    Args:
        pipe (`CounterfactualDDIMPipeline`): shared by all sessions.
        facts (`Mapping`): as from `segmentation_facts`.
        root (`Path`): the app's temporary folder; `root / "uploads"` is gradio's, where it stores and serves files.
        batch_size (`int`, *optional*): slices at a time for the whole volume.
        max_bytes (`int`): limit for each file, decompressed.
        convention (`str`): of the pictures, `radiological` or `neurological`.
    """

    def __init__(
        self,
        pipe,
        facts: Mapping,
        root: Path,
        batch_size: int | None,
        max_bytes: int,
        convention: str = "radiological",
    ) -> None:
        self.pipe, self.facts, self.root, self.batch_size, self.max_bytes = pipe, facts, root, batch_size, max_bytes
        self.convention = convention
        self.modalities, self.recommended = facts["preprocessing"]["modalities"], facts["settings"]
        knows = pipe.preprocessing.get("source") == "phantom"
        self.about_phantoms = "a simulated brain and no patient" + (
            "" if knows else "; this model has learned from others"
        )
        self.has_student = self.recommended["map"] == "student"
        self.start_values = {name: round(self.recommended[name] or 0, 3) for name in SETTINGS}
        # uploads that no handler takes are deleted after half an hour
        self.blocks = gr.Blocks(
            title="diffusers_cf", analytics_enabled=False, delete_cache=(60, 1800), fill_width=True
        )
        with self.blocks:
            self._add_components()
            self._add_events()

    def _add_components(self) -> None:
        # scans that wait for those of other modalities
        self.waiting = gr.State(time_to_live=SECONDS_KEPT, delete_callback=lambda found: found and found.cleanup())
        self.explorer = gr.State(time_to_live=SECONDS_KEPT, delete_callback=lambda found: found and found.close())
        gr.Markdown(INTRODUCTION)
        with gr.Row(equal_height=True):
            label = f"NIfTI or zip: {', '.join(self.modalities)}"
            self.files = gr.File(label=label, file_count="multiple", elem_id="cf-files", height=90, scale=3)
            self.folder = gr.UploadButton(
                "or a folder", file_count="directory", elem_id="cf-folder", scale=1, min_width=110
            )
            phantoms = {*map(canonical_modality, self.modalities)} <= {*MODALITIES}  # else it lacks a modality
            self.phantom = gr.Radio(
                list(PHANTOMS), value=next(iter(PHANTOMS)) if phantoms else None, visible=phantoms,
                label="or a phantom (a simulated brain)", elem_id="cf-phantom", scale=3,
            )  # fmt: skip
        self.message = gr.HTML(START, elem_id="cf-message", min_height=24)
        self.pictures, self.verdict = gr.HTML(elem_id="cf-pictures", js_on_load=ZOOM), gr.HTML(elem_id="cf-verdict")
        with gr.Row():
            # gradio checks a value against this range also after it has dropped the session: 0 to 9999 fits any scan
            self.index = gr.Slider(0, 9999, step=1, label="slice (0 = lowest)", elem_id="cf-index", scale=3)
            self.channel = gr.Radio(
                self.modalities, value=self.modalities[0], label="modality", elem_id="cf-channel", scale=2
            )
        passes = self.pipe.network_evaluations(**self.recommended | {"map": "counterfactual"})
        self.paint = gr.Checkbox(
            not self.has_student, visible=self.has_student, label="Paint the counterfactual", elem_id="cf-paint",
            info=f"The slice as if healthy, with the settings below: {passes} network passes, the heatmap takes one.",
        )  # fmt: skip
        with gr.Row():
            guidance_scale, strength, steps, threshold = self.start_values.values()
            train_steps = self.pipe.scheduler.config.num_train_timesteps
            counts = sorted({n for n in range(4, 101) if train_steps % n == 0} | {steps})
            high, heat = max(20, 2 * guidance_scale), max(HEAT_MAXIMUM, 2 * threshold)
            self.settings = [
                gr.Slider(
                    0, high, guidance_scale, step=0.5, label="guidance scale w", elem_id="cf-guidance_scale",
                    info="How strongly the model pulls towards healthy. Higher changes more, also sound tissue.",
                ),
                gr.Slider(
                    0.05, 1, strength, step=0.05, label="strength L", elem_id="cf-strength",
                    info="How much of the scan is repainted. Higher removes larger lesions and keeps less anatomy.",
                ),
                gr.Dropdown(
                    counts, value=steps, label="steps", elem_id="cf-num_inference_steps",
                    info="How finely the model works. More take longer and stay nearer to the scan.",
                ),
                gr.Slider(
                    0, heat, threshold, step=0.001, label="threshold", elem_id="cf-threshold",
                    info="Lesion is where the heatmap reaches this value. Lower finds more; 0 draws no mask.",
                ),
            ]  # fmt: skip
        with gr.Row():
            self.segment_button = gr.Button("Whole volume", variant="primary", elem_id="cf-volume", scale=5)
            self.stop_button = gr.Button("Stop", variant="stop", elem_id="cf-stop", scale=1, min_width=90)
        self.found = gr.HTML(elem_id="cf-found", min_height=64)
        with gr.Row(visible=False) as self.downloads:
            self.heatmap = gr.DownloadButton("Download heatmap (NIfTI)", elem_id="cf-heatmap")
            self.mask = gr.DownloadButton("Download mask (NIfTI)", elem_id="cf-mask")
        self.planes = gr.HTML(elem_id="cf-planes")
        self.controls = [
            self.index, self.channel, self.paint, *self.settings, self.segment_button, self.stop_button
        ]  # fmt: skip
        for control in self.controls:  # nothing to operate before a patient is loaded
            control.interactive = False

    def _add_events(self) -> None:
        controls, pictures = self.controls[:-2], [self.pictures, self.verdict]
        results = [*pictures, self.found, self.planes, self.downloads, self.heatmap, self.mask]
        sources = [self.explorer, self.waiting, self.files, self.folder, self.phantom]
        given, loaded = [*sources, *controls[1:]], [*sources, self.message, *self.controls, *results]
        common = {"api_visibility": "private", "concurrency_id": "slice", "concurrency_limit": 2}
        gr.on(
            [self.blocks.load, self.files.upload, self.folder.upload, self.phantom.input], self.load, given, loaded,
            trigger_mode="always_last", show_progress_on=self.pictures, **common,
        )  # fmt: skip
        shown = gr.on(
            [control.input for control in controls], self.show, [self.explorer, *controls], pictures,
            trigger_mode="always_last", show_progress="hidden", **common,
        )  # fmt: skip
        found = self.segment_button.click(
            self.segment, [self.explorer, *controls], results, show_progress_on=self.found,
            **common | {"concurrency_id": "volume", "concurrency_limit": 1},
        )  # fmt: skip
        # gradio drops what waits or runs, and would let its thread go on
        self.stop_button.click(
            lambda explorer: explorer and explorer.stop(), self.explorer, cancels=[shown, found],
            api_visibility="private", queue=False,
        )  # fmt: skip
        self.blocks.unload(self.leave)

    def load(
        self, explorer: Explorer | None, waiting: TemporaryDirectory | None, files: list[str] | None,
        folder_files: list[str] | None, phantom: str | None, channel: str, paint: bool, *values: float,
    ) -> Iterator[dict]:  # fmt: skip
        """Load the files that were dropped, or else the chosen phantom, and show the first slice.

        Files belong to the patient of earlier ones if these have none of their modalities; else a new patient begins.
        While modalities are missing, files wait. Files that are no scans change nothing.
        """
        if not (files := files or folder_files) and not phantom:  # a page that opens on no phantom
            return
        yield {self.files: None, self.folder: None}
        folder = TemporaryDirectory(dir=self.root, ignore_cleanup_errors=True)
        scans = Path(folder.name, "patient")
        try:
            with self._errors_shown():
                if files:
                    taken = take_scans(files, Path(folder.name, "new"), self.modalities, self.max_bytes)
                    earlier = (
                        Path(waiting.name, scans.name) if waiting else explorer and not phantom and explorer.scans
                    )
                    held = scans_among(sorted(earlier.iterdir()), [*self.modalities, "seg"]) if earlier else {}
                    taken |= {} if taken.keys() & held else {modality: paths[0] for modality, paths in held.items()}
                    scans.mkdir()
                    for path in taken.values():
                        shutil.move(path, scans)
                    shutil.rmtree(Path(folder.name, "new"))
            explorer and explorer.close()
            waiting and waiting.cleanup()
            missing = [name for name in self.modalities if files and name not in taken]
            have = ", ".join(name for name in self.modalities if files and name in taken)
            yield {
                self.explorer: None,
                self.waiting: folder if missing else None,
                self.phantom: None if files else phantom,
                self.message: f"Have {have or 'seg'}; still missing: {', '.join(missing)}." if missing else START,
                **dict.fromkeys((self.pictures, self.verdict, self.found, self.planes), ""),
                self.downloads: gr.Row(visible=False),
                **{control: gr.update(interactive=False) for control in self.controls},
            }
            if missing:
                return
            with self._errors_shown():
                if not files:
                    scans = write_patient(make_patient(*PHANTOMS[phantom]), folder.name)
                served, limit = self.root / "uploads", self.max_bytes if files else MAX_BYTES
                explorer = Explorer(self.pipe, self.facts, folder, scans, served, self.batch_size, limit)
                *_, shown = self.show(explorer, explorer.first_slice, channel, paint, *values)
        except BaseException:  # also where the page is left
            folder.cleanup()
            raise
        slices, names = explorer.slices, ", ".join(self.modalities)
        kind = "" if files else f"<b>{phantom}</b>, {self.about_phantoms}. "
        message = ". ".join([f"{names}: {len(slices)} slices with content", *explorer.volumes.warnings])
        yield shown | {
            self.explorer: explorer,
            self.message: kind + escape(self._without_folder(message)),
            **{control: gr.update(interactive=True) for control in self.controls},
            self.index: gr.Slider(slices[0], slices[-1], explorer.first_slice, interactive=True),
        }

    def show(self, explorer: Explorer | None, index: int, channel: str, paint: bool, *values: float) -> Iterator[dict]:
        """Show a slice: pictures and verdict; a student's map at once, before the counterfactual is painted."""
        with self._errors_shown():
            if explorer is None:  # gradio has dropped the session's state
                raise InputError("the session has ended: load the patient again")
            settings = self._settings(values)
            unit = unit_in_words(self.facts["preprocessing"]["normalize"], settings["map"])
            look = self.modalities.index(channel), self.modalities, unit, settings["map"], self.convention
            for painted in (False, True) if self.has_student and paint else (paint,):
                view = explorer.view(int(index), settings, painted)
                yield {self.pictures: slice_html(view, *look), self.verdict: verdict_html(view, settings["threshold"])}

    def segment(
        self, explorer: Explorer | None, index: int, channel: str, paint: bool, *values: float, progress=PROGRESS
    ) -> Iterator[dict]:
        """Segment the whole volume, offer heatmap and mask for download, and show three planes."""
        chosen = explorer, index, channel, paint, *values
        next(self.show(*chosen))  # fails at once if the session has ended
        with self._errors_shown():
            found = explorer.segment(self._settings(values), lambda share: progress(share, desc="whole volume"))
        for shown in self.show(*chosen):
            yield shown | {
                self.found: volume_html(found),
                self.downloads: gr.Row(visible=True),
                self.heatmap: str(found.heatmap),
                self.mask: str(found.mask),
            }
        with self._errors_shown():
            scan = patient_files(explorer.scans, self.modalities)[channel]
            yield {self.planes: planes_html(found, scan, self.convention)}

    def leave(self, request: gr.Request) -> None:
        """Delete the session's state now; gradio itself would keep it for another hour."""
        self.blocks.state_holder.delete_state(request.session_hash)

    def _settings(self, values: tuple[float, ...]) -> dict:
        """Return settings from the controls; a control that was not moved gives exactly the recommended value."""
        given = zip(SETTINGS, values, strict=True)
        return self.recommended | {name: value for name, value in given if value != self.start_values[name]}

    def _without_folder(self, text: str) -> str:
        """Remove the paths of the app's temporary folders from a message; the files' own names stay."""
        return re.sub(rf"{re.escape(str(self.root))}/\w+/[^/:]+(/|: )", "", text)

    @contextmanager
    def _errors_shown(self) -> Iterator[None]:
        """Show an error on the page as one line; the log gets no message, because it could name a patient's file."""
        try:
            yield
        except gr.Error:
            raise
        except Exception as error:
            line = in_one_line(error)
            if isinstance(error, MemoryError) or should_reduce_batch_size(error):
                line = "out of memory: try a smaller scan, or try again when fewer patients are open here"
            elif line is None:
                line = f"a fault of this program ({type(error).__name__})"
                traceback.print_tb(error.__traceback__)
            raise gr.Error(escape(self._without_folder(line)), duration=None, print_exception=False) from None
