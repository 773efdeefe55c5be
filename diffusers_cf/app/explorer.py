"""One patient in one user's hands: any slice under any settings from one encoding, and the whole volume as files."""

import contextlib
import copy
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffusers_cf.data.geometry import display, volume_from_slices
from diffusers_cf.data.intensity import unit_intensity
from diffusers_cf.data.nifti import MAX_BYTES, read_nifti, to_canonical
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.trajectories import Encoding, decode_images, decode_null, encode_images
from diffusers_cf.images import resize_images
from diffusers_cf.segmentation.patient import segment_patient
from diffusers_cf.segmentation.volumes import (
    SliceMaps,
    heat_volume,
    lesion_mask,
    network_slices,
    patient_files,
    read_volumes,
)


PATIENT = "patient"  # names of patients are nobody's business
RECENT = 8  # slices and settings, to which a user comes back
MARGIN_MM = 6.0  # of background round the brain in a picture
CLOSED = "this session has ended: load the patient again"


@dataclass
class SliceView:
    """One axial slice at the scan's own resolution, row 0 anterior, column 0 the patient's left, cropped to the brain.

    Attributes:
        images: float32 (C, H, W), in input units.
        counterfactuals: float32 (C, H, W), in input units.
        heatmap: float32 (H, W), in input units, 0 outside the foreground.
        mask: bool (H, W), the lesion; None without a threshold.
        reference: bool (H, W), the expert's lesion; None without one.
        pixel_mm: Height and width of a pixel.
        score: Mean heat over the foreground, as in evaluation's slice AUROC; 0 for an empty slice.
        of_volume: Whether the mask is that of the whole volume, where small components were removed in three dimensions.
    """

    images: np.ndarray
    counterfactuals: np.ndarray
    heatmap: np.ndarray
    mask: np.ndarray | None
    reference: np.ndarray | None
    pixel_mm: tuple[float, float]
    score: float
    of_volume: bool

    @property
    def lesion_cm2(self) -> float:
        """Area of the mask; 0 without one."""
        return 0.0 if self.mask is None else float(self.mask.sum() * np.prod(self.pixel_mm) / 100)


@dataclass
class VolumeFiles:
    """What `segment` has written about the whole volume.

    Attributes:
        report: The content of report.json.
        heatmap: Its file.
        mask: Its file.
        lesion_slices: Rising axial indices of the slices with lesion.
    """

    report: dict
    heatmap: Path
    mask: Path
    lesion_slices: list[int]


class Recent:
    """The last few things that were made, by what they depend on."""

    def __init__(self, limit: int = RECENT) -> None:
        self.limit, self._made = limit, {}

    def get(self, key: Hashable, make: Callable):
        """What was made for a key, or is now."""
        self._made[key] = self._made.pop(key) if key in self._made else make()  # the latest stands last
        if len(self._made) > self.limit:
            del self._made[next(iter(self._made))]
        return self._made[key]

    def drop(self, key: Hashable) -> None:
        """Forgets what was made for a key."""
        self._made.pop(key, None)


class Explorer:
    """One patient's scans, encodings of the slices that were looked at last, and the files made of the whole volume.

    Args:
        pipe: A `CounterfactualDDIMPipeline`; others may use it at the same time.
        facts: As from `volumes.segmentation_facts`.
        folder: Of this patient alone: its `scans` are in it; results are written to it; deleted by `close`.
        batch_size: Slices at a time for the whole volume, as in `segment`.
        max_bytes: Limit for the decompressed size of a file.
        max_memory: Limit for the scans in memory, in bytes.
        served: A folder from which anybody may fetch what has been named to them: it gets heatmap and mask of the whole
            volume, and nothing else, under a name that can't be guessed, until `close`; `folder` itself unless given.

    Raises:
        InputError: The scans can't be used; the message is one line without the folder's path.
    """

    def __init__(
        self,
        pipe,
        facts: Mapping,
        folder: Path,
        batch_size: int | None = None,
        max_bytes: int = MAX_BYTES,
        max_memory: int = MAX_BYTES,
        served: Path | None = None,
    ) -> None:
        self.pipe, self.facts, self.folder, self.batch_size = with_own_schedulers(pipe), facts, folder, batch_size
        self.modalities = facts["preprocessing"]["modalities"]
        self._lock, self._closed = threading.Lock(), False
        self._encodings, self._nulls, self._maps = Recent(), Recent(), Recent()
        self._served, self._results = served or folder, None
        self._finished: tuple[dict, np.ndarray] | None = None
        with pathless_errors(folder), warnings_of_this_thread() as warnings:
            files = patient_files(folder / "scans", self.modalities)
            max_voxels = max_memory // (len(self.modalities) * np.dtype(np.float32).itemsize)
            self.volumes = read_volumes(PATIENT, files, max_bytes, max_voxels)
            self.found = network_slices(self.volumes, facts)
        self.warnings = [without_path(warning, folder) for warning in warnings]
        normalize = facts["preprocessing"]["normalize"]
        self._scales = np.array([unit_intensity(scan, normalize) for scan in self.volumes.volume], np.float32)
        self._crop = _crop(self.volumes.foreground, self.volumes.spacing_mm)

    @property
    def slices(self) -> range:
        """Axial indices of the slices with content, 0 = lowest of the scan."""
        return range(int(self.found.slices[0]), int(self.found.slices[-1]) + 1)

    @property
    def first_slice(self) -> int:
        """Where to begin: the slice with most of the expert's lesion, or in the middle where there is none."""
        seg = self.volumes.seg
        if seg is None or not seg.any():
            return self.slices[len(self.slices) // 2]
        return int(seg.sum(axis=(0, 1)).argmax())

    def view(self, index: int, settings: Mapping) -> SliceView:
        """One slice under settings; only what depends on what has changed since the last call is computed.

        Args:
            index: One of `slices`.
            settings: As from `pipe.resolve_settings`; a threshold of None or 0 is none.

        Raises:
            InputError: The session has ended, a setting is out of range, or the model yields NaN.
        """
        if self._closed:
            raise InputError(CLOSED)
        if index not in self.slices:
            raise InputError(f"slice {index}: the scan has content from {self.slices[0]} to {self.slices[-1]}")
        with self._lock:
            maps = self._slice_maps(index, settings)
        one = slice(index, index + 1)
        seg = None if self.volumes.seg is None else self.volumes.seg[..., one]
        volumes = replace(self.volumes, volume=self.volumes.volume[..., one], seg=seg)
        field_mm = self.facts["preprocessing"]["field_mm"]
        heat = heat_volume(volumes, maps, maps.heatmaps, field_mm)
        mask, of_volume = self._mask(index, settings, volumes, maps, heat)
        images = volumes.volume / self._scales[:, None, None, None]
        shape = heat.shape
        changes = [volume_from_slices(c[None], [0], shape, volumes.spacing_mm, field_mm) for c in maps.changes[0]]
        counterfactuals = np.clip(images + np.stack(changes) * volumes.foreground, 0, None)
        inside = (maps.found.images[0] > 0).any(axis=0)
        return SliceView(
            *(self._shown(part) for part in (images, counterfactuals, heat, mask, seg)),
            pixel_mm=(float(volumes.spacing_mm[1]), float(volumes.spacing_mm[0])),
            score=float(maps.heatmaps[0][inside].mean()) if inside.any() else 0.0,
            of_volume=of_volume,
        )

    def segment(self, settings: Mapping, progress: Callable[[float], None]) -> VolumeFiles:
        """The whole volume by the code of `diffusers-cf segment`, and so the same files.

        Args:
            settings: As in `view`, with a threshold.
            progress: Told after each step which share of them is done.

        Raises:
            InputError: There is no threshold, the session ends meanwhile, or the disk is full.
        """
        if not settings["threshold"]:
            raise InputError("no threshold: the model recommends none, so move its slider before the whole volume")
        output, before = self.folder / "run", self._results

        def tell(share: float) -> None:
            if self._closed:
                raise InputError(CLOSED)
            progress(share)

        options = {"model": self.facts["model"], "patient": PATIENT, "batch_size": self.batch_size}
        try:
            with pathless_errors(self.folder):
                pipe = with_own_schedulers(self.pipe)  # slices are looked at meanwhile
                report = segment_patient(pipe, self.folder / "scans", output, progress=tell, **options, **settings)
                mask = to_canonical(read_nifti(output / PATIENT / "mask.nii.gz")).data > 0
                self._results = self._served / secrets.token_hex(16)
                files = _move_results(output / PATIENT, self._results)
            self._finished = dict(settings), mask
            if before:
                shutil.rmtree(before, ignore_errors=True)
        except InputError as error:  # what it was at may have vanished under it
            raise (InputError(CLOSED) if self._closed else error) from None
        finally:
            shutil.rmtree(output, ignore_errors=True)
            if self._closed:
                self.close()
        if self._closed:
            raise InputError(CLOSED)
        return VolumeFiles(report, *files, np.flatnonzero(mask.any(axis=(0, 1))).tolist())

    def close(self) -> None:
        """Deletes the patient's folder and results; a computation that still runs stops at its next step."""
        self._closed = True
        for folder in filter(None, (self.folder, self._results)):
            shutil.rmtree(folder, ignore_errors=True)

    def _slice_maps(self, index: int, settings: Mapping) -> SliceMaps:
        """Heatmap and change of one slice, over the field."""
        key = (index, *(settings[name] for name in ("guidance_scale", "strength", "num_inference_steps", "map")))
        return self._maps.get(key, lambda: self._make_maps(index, settings))

    def _make_maps(self, index: int, settings: Mapping) -> SliceMaps:
        grid = (index, settings["num_inference_steps"])
        row = index - self.slices[0]
        images = torch.from_numpy(self.found.images[row : row + 1])
        try:
            changes, heat = self._changes_and_heat(grid, images, settings)
        except ValueError as error:
            raise InputError(str(error)) from None
        if not (torch.isfinite(changes).all() and torch.isfinite(heat).all()):
            raise InputError(f"{self.facts['model']}: the model yields NaN or infinite values on slice {index}")
        size = tuple(images.shape[-2:])
        found = replace(
            self.found, images=images.numpy(), slices=np.zeros(1, np.int64), labels=self.found.labels[:1], masks=None
        )
        heatmaps = resize_images(heat[:, None], size)[:, 0].float().cpu().numpy()
        return SliceMaps(found, heatmaps, resize_images(changes, size).float().cpu().numpy())

    def _changes_and_heat(self, grid: tuple[int, int], images: torch.Tensor, settings: Mapping):
        """Changes `(1, C, h, w)` and heatmap `(1, h, w)` of a slice, with all that is still there of earlier settings."""
        if settings["map"] == "forward":  # guidance is a part of its only walk
            out = self.pipe(images, **{name: value for name, value in settings.items() if name != "threshold"})
            return out.counterfactuals.cpu() - images, out.heatmaps
        encoding, null = self._encoding(grid, images, settings["strength"]), None
        if settings["map"] != "counterfactual":  # it depends on no guidance scale
            null = self._nulls.get((*grid, settings["strength"]), lambda: decode_null(self.pipe, encoding, settings))
        return decode_images(self.pipe, encoding, settings, null)

    def _encoding(self, grid: tuple[int, int], images: torch.Tensor, strength: float) -> Encoding:
        """One for each slice and number of steps, made anew where a strength lies beyond its end."""

        def make() -> Encoding:
            return encode_images(self.pipe, images, strength, grid[1])

        encoding = self._encodings.get(grid, make)
        if encoding.steps < round(grid[1] * strength):
            self._encodings.drop(grid)
            encoding = self._encodings.get(grid, make)
        return encoding

    def _mask(self, index: int, settings: Mapping, volumes, maps: SliceMaps, heat: np.ndarray):
        """The lesion of a slice, (X, Y, 1), and whether it is that of the whole volume."""
        if not settings["threshold"]:
            return None, False
        if self._finished and self._finished[0] == settings:
            return self._finished[1][..., index : index + 1], True
        return lesion_mask(volumes, maps, heat, {**self.facts, "threshold": settings["threshold"]}), False

    def _shown(self, volume: np.ndarray | None) -> np.ndarray | None:
        """(.., X, Y, 1) as pictures (.., H, W), cropped."""
        return None if volume is None else display(volume)[0][(..., *self._crop)]


def with_own_schedulers(pipe):
    """The same networks in a pipeline that may be used at the same time: schedulers keep the timesteps of a walk."""
    other = copy.copy(pipe)
    other.scheduler, other.inverse_scheduler = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.inverse_scheduler)
    return other


def _move_results(written: Path, folder: Path) -> list[Path]:
    """Moves heatmap and mask of a patient out of what `segment` has written; both lie on one file system."""
    folder.mkdir(mode=0o700)
    files = [folder / f"{name}.nii.gz" for name in ("heatmap", "mask")]
    for path in files:
        os.replace(written / path.name, path)
    return files


def _crop(foreground: np.ndarray, spacing_mm: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a displayed slice that hold the foreground (X, Y, Z) of all slices, and a margin."""
    shown = display(foreground).any(axis=0)
    spans = []
    for axis, voxel_mm in ((0, spacing_mm[1]), (1, spacing_mm[0])):
        filled, margin = np.flatnonzero(shown.any(axis=1 - axis)), round(MARGIN_MM / float(voxel_mm))
        spans.append(slice(max(0, int(filled[0]) - margin), int(filled[-1]) + 1 + margin))
    return spans[0], spans[1]


def without_path(text: str, folder: Path) -> str:
    """A message as a user may see it: files by their names, in one line."""
    for part in (folder / "scans", folder):
        text = text.replace(f"{part}{os.sep}", "").replace(str(part), "the patient's files")
    return " ".join(text.split())


@contextlib.contextmanager
def pathless_errors(folder: Path) -> Iterator[None]:
    """Takes a folder's path out of the messages of `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(without_path(str(error), folder)) from None


@contextlib.contextmanager
def warnings_of_this_thread() -> Iterator[list[str]]:
    """What the package warns of meanwhile, for the user who has caused it alone."""
    found, thread = [], threading.get_ident()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage()) if record.thread == thread else None
    logger = logging.getLogger("diffusers_cf")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
