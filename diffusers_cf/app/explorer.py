"""One patient on the page: any slice under any settings from one encoding, and the whole volume as files."""

import copy
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy import ndimage

from diffusers_cf.data.geometry import display, volume_from_slices
from diffusers_cf.data.intensity import unit_intensity
from diffusers_cf.data.nifti import MAX_BYTES, read_nifti, to_canonical
from diffusers_cf.data.slices import PatientSlices
from diffusers_cf.errors import InputError
from diffusers_cf.evaluation.trajectories import decode_images, decode_null, encode_images
from diffusers_cf.images import resize_images
from diffusers_cf.segmentation.cohorts import patient_files
from diffusers_cf.segmentation.patient import segment_patient
from diffusers_cf.segmentation.volumes import SliceMaps, heat_volume, lesion_mask, network_slices, read_volumes
from diffusers_cf.settings import DECODED_MAPS, MAP_SETTINGS


PATIENT = "patient"  # the page shows no patient's name
RECENT = 8  # values that a cache keeps
MARGIN_MM = 6.0  # of background around the brain in a picture


@dataclass
class SliceView:
    """One axial slice at the scan's own resolution, cropped to the brain; row 0 anterior, column 0 the patient's left."""

    images: np.ndarray  # float32 (C, H, W), in input units
    counterfactuals: np.ndarray | None  # float32 (C, H, W), in input units; None if none was painted
    heatmap: np.ndarray  # float32 (H, W), in input units, 0 outside the foreground
    mask: np.ndarray | None  # bool (H, W), the lesion found; None without a threshold
    reference: np.ndarray | None  # bool (H, W), the expert's lesion
    pixel_mm: tuple[float, float]  # height and width
    score: float  # mean heat over the foreground, as in the slice AUROC of evaluation; 0 for an empty slice
    of_volume: bool  # the mask is that of the whole volume, without its small components


@dataclass
class VolumeFiles:
    """What `segment` has written about the whole volume."""

    report: dict  # content of report.json
    heatmap: Path
    mask: Path
    lesion_slices: list[int]  # axial indices, in rising order


def recent(cache: dict, key: tuple, make: Callable):
    """Return the value of a key, made if it is missing. The cache keeps the `RECENT` values that were used last."""
    cache[key] = cache.pop(key) if key in cache else make()
    if len(cache) > RECENT:
        del cache[next(iter(cache))]
    return cache[key]


class Explorer:
    """One patient's scans, the encodings and maps of the slices viewed last, and the files of the whole volume.

    `close` deletes its temporary folders, and so does garbage collection of the explorer.

    Args:
        pipe (`CounterfactualDDIMPipeline`): may be shared with other explorers.
        facts (`Mapping`): as from `segmentation_facts`.
        folder (`TemporaryDirectory`): this patient's own.
        scans (`Path`): the folder of the patient's scans, inside `folder`.
        served (`Path`): a folder whose files the server sends to anyone who knows their path. Only heatmap and mask of
            the whole volume are put there, in a sub-folder whose name can't be guessed.
        batch_size (`int`, *optional*): slices at a time for the whole volume, as in `segment`.
        max_bytes (`int`): limit for the size of a file after decompression, and for its voxels as float32.

    Raises:
        InputError: the scans can't be used.
    """

    def __init__(
        self, pipe, facts: Mapping, folder: TemporaryDirectory, scans: Path, served: Path,
        batch_size: int | None = None, max_bytes: int = MAX_BYTES,
    ) -> None:  # fmt: skip
        self.pipe, self.facts, self.scans, self.batch_size = with_own_schedulers(pipe), facts, scans, batch_size
        self._folder, self._served, self._results = folder, served, None
        self._lock, self._stops = threading.Lock(), 0
        self._encodings, self._nulls, self._maps = {}, {}, {}
        self._finished = None, None  # settings and mask of the whole volume
        files = patient_files(scans, facts["preprocessing"]["modalities"])
        self.volumes = read_volumes(PATIENT, files, max_bytes, max_bytes // np.dtype(np.float32).itemsize)
        self.found = network_slices(self.volumes, facts)
        normalize = facts["preprocessing"]["normalize"]
        self._scales = np.array([unit_intensity(scan, normalize) for scan in self.volumes.volume], np.float32)
        self._crop = _crop(self.volumes.foreground, self.volumes.spacing_mm)

    @property
    def slices(self) -> range:
        """Axial indices of the slices with content; 0 is the lowest slice of the scan."""
        return range(int(self.found.slices[0]), int(self.found.slices[-1]) + 1)

    @property
    def first_slice(self) -> int:
        """The slice to show first: the one with most of the expert's lesion, or else the middle one."""
        seg = self.volumes.seg
        has_lesion = seg is not None and seg.any()
        return int(seg.sum(axis=(0, 1)).argmax()) if has_lesion else self.slices[len(self.slices) // 2]

    def view(self, index: int, settings: Mapping, paint: bool = True) -> SliceView:
        """Return one slice under the given settings; only what changed since an earlier call is computed.

        The map `student` makes no counterfactual. With `paint` the network paints one beside it.

        Args:
            index (`int`): one of `slices`.
            settings (`Mapping`): as from `pipe.resolve_settings`; a threshold of None or 0 means no mask.
            paint (`bool`): whether to paint a counterfactual beside a map that makes none.

        Raises:
            InputError: a setting is out of range, the model yields NaN, or `stop` was called.
        """
        check = self._until_stopped()
        with self._lock:
            check()
            maps = self._maps_of(index, settings, check)
            if paint and maps.changes is None:
                painted = self._maps_of(index, {**settings, "map": "counterfactual"}, check)
                maps = replace(maps, changes=painted.changes)
        one = slice(index, index + 1)
        seg = None if self.volumes.seg is None else self.volumes.seg[..., one]
        volumes = replace(self.volumes, volume=self.volumes.volume[..., one], seg=seg)
        field_mm, spacing_mm = self.facts["preprocessing"]["field_mm"], volumes.spacing_mm
        heat = heat_volume(volumes, maps, maps.heatmaps, field_mm)
        finished = self._finished[0] == settings
        if not settings["threshold"]:
            mask = None
        elif finished:
            mask = self._finished[1][..., one]
        else:
            facts = {**self.facts, "threshold": settings["threshold"]}
            mask = lesion_mask(volumes, maps, heat, facts, self.found.images)
        images = volumes.volume / self._scales[:, None, None, None]
        counterfactuals = None
        if maps.changes is not None:
            changes = [volume_from_slices(c[None], [0], heat.shape, spacing_mm, field_mm) for c in maps.changes[0]]
            counterfactuals = np.clip(images + np.stack(changes) * volumes.foreground, 0, None)
        inside = (maps.found.images[0] > 0).any(axis=0)
        parts = (images, counterfactuals, heat, mask, seg)  # (.., X, Y, 1)
        return SliceView(
            *(None if part is None else display(part)[0][(..., *self._crop)] for part in parts),
            pixel_mm=(float(spacing_mm[1]), float(spacing_mm[0])),
            score=float(maps.heatmaps[0][inside].mean()) if inside.any() else 0.0,
            of_volume=mask is not None and finished,
        )

    def segment(self, settings: Mapping, progress: Callable[[float], None]) -> VolumeFiles:
        """Segment the whole volume by the code of `diffusers-cf segment`, which gives the same files.

        Args:
            settings (`Mapping`): as in `view`, with a threshold.
            progress (`Callable`): called after each step with the share of steps done, 0 to 1.

        Raises:
            InputError: there is no threshold, or `stop` or `close` was called.
            OSError: the files can't be written, for example because the patient was closed.
        """
        if not settings["threshold"]:
            raise InputError("no threshold: the model recommends none, so set one before segmenting the whole volume")

        check = self._until_stopped()

        def tell(share: float) -> None:
            check()
            progress(share)

        options = {"model": self.facts["model"], "patient": PATIENT, "batch_size": self.batch_size, "progress": tell}
        with TemporaryDirectory(dir=self._folder.name) as output:
            pipe = with_own_schedulers(self.pipe)  # `view` may be called meanwhile
            report = segment_patient(pipe, self.scans, output, **options, **settings)
            written = [Path(output, PATIENT, name) for name in ("heatmap.nii.gz", "mask.nii.gz")]
            mask = to_canonical(read_nifti(written[1])).data > 0
            self._results and self._results.cleanup()  # of an earlier call
            self._results = TemporaryDirectory(prefix=secrets.token_hex(16), dir=self._served)
            files = [Path(shutil.move(path, self._results.name)) for path in written]
        self._finished = dict(settings), mask
        return VolumeFiles(report, *files, np.flatnonzero(mask.any(axis=(0, 1))).tolist())

    def stop(self) -> None:
        """End what `view` and `segment` are computing at its next step; what was computed before stays."""
        self._stops += 1

    def close(self) -> None:
        """Delete the patient's files and results; what is computed ends at its next step."""
        self.stop()
        self._folder.cleanup()
        self._results and self._results.cleanup()

    def _until_stopped(self) -> Callable:
        """Return a callback for the steps from now on."""
        begun = self._stops

        def check(*_) -> dict:
            if self._stops != begun:
                raise InputError("stopped")
            return {}

        return check

    def _maps_of(self, index: int, settings: Mapping, check: Callable) -> SliceMaps:
        """Return a slice's maps, computed if need be; those of a student depend on no setting."""
        given = () if settings["map"] == "student" else [settings[name] for name in MAP_SETTINGS]
        return recent(self._maps, (index, *given), lambda: self._compute_maps(index, settings, check))

    def _compute_maps(self, index: int, settings: Mapping, callback: Callable) -> SliceMaps:
        """Compute a slice's maps, from an earlier encoding and null decoding where they are the same."""
        row, steps, strength = index - self.slices[0], settings["num_inference_steps"], settings["strength"]
        found = PatientSlices(PATIENT, self.found.images[row : row + 1], self.found.labels[:1], np.zeros(1, np.int64))
        images, key, null = torch.from_numpy(found.images), (index, steps), None
        try:
            if settings["map"] not in DECODED_MAPS:  # nothing of it can be used again
                given = {name: settings[name] for name in MAP_SETTINGS}
                out = self.pipe(images, **given, callback_on_step_end=callback)
                heat = out.heatmaps
                changes = None if out.counterfactuals is None else out.counterfactuals.cpu() - images
            else:
                if key in self._encodings and self._encodings[key].steps < round(steps * strength):
                    del self._encodings[key]
                encode = partial(encode_images, self.pipe, images, strength, steps, callback)
                encoding = recent(self._encodings, key, encode)
                if settings["map"] != "counterfactual":  # the null decoding depends on no guidance scale
                    decode = partial(decode_null, self.pipe, encoding, settings, callback)
                    null = recent(self._nulls, (*key, strength), decode)
                changes, heat = decode_images(self.pipe, encoding, settings, null, callback)
        except ValueError as error:  # a combination of settings that the pipeline refuses
            raise InputError(str(error)) from None
        if not all(torch.isfinite(part).all() for part in (heat, changes) if part is not None):
            raise InputError(f"{self.facts['model']}: the model yields NaN or infinite values on slice {index}")
        heat, changes = (
            None if part is None else resize_images(part, images.shape[-2:]).float().cpu().numpy()
            for part in (heat[:, None], changes)
        )  # fmt: skip
        return SliceMaps(found, heat[:, 0], changes)


def with_own_schedulers(pipe):
    """Return a pipeline with the same networks that may run at the same time: schedulers hold the timesteps of a run."""
    other = copy.copy(pipe)
    other.scheduler, other.inverse_scheduler = copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.inverse_scheduler)
    return other


def _crop(foreground: np.ndarray, spacing_mm: np.ndarray) -> tuple[slice, slice]:
    """Return rows and columns of a displayed slice that hold the foreground (X, Y, Z) of all slices and a margin."""
    (box,) = ndimage.find_objects(display(foreground).any(axis=0).astype(int))
    margins = (round(MARGIN_MM / float(spacing_mm[axis])) for axis in (1, 0))
    return tuple(slice(max(0, span.start - n), span.stop + n) for span, n in zip(box, margins, strict=True))
