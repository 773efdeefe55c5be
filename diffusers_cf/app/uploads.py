"""Uploaded files of one patient: moved away from where gradio serves them, zips unpacked, all but scans deleted."""

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from diffusers_cf.data.nifti import ALIASES, canonical_modality
from diffusers_cf.errors import InputError, reading
from diffusers_cf.segmentation.cohorts import scans_among


MAX_MEMBERS = 10_000  # of a zip


def take_scans(uploads: Sequence[str], folder: Path, modalities: Sequence[str], max_bytes: int) -> dict[str, Path]:
    """Move uploads into a new folder and return the scan of each modality that is there, and `seg`.

    Args:
        uploads (`Sequence[str]`): files, also zips; other files than a model's scans are ignored.
        folder (`Path`): gets everything, also what is ignored.
        modalities (`Sequence[str]`): those of the model.
        max_bytes (`int`): limit for the unpacked size of a zip.

    Raises:
        InputError: an upload is gone, a zip can't be unpacked, or there is no scan, or several of a modality.
    """
    for number, path in enumerate(map(Path, uploads)):
        if not path.is_file():  # moved by another session that uploaded the same file, or a false claim
            raise InputError("the upload is gone: drop the files again")
        target = folder / str(number)
        target.mkdir(parents=True)
        upload = Path(shutil.move(path, target))
        if zipfile.is_zipfile(upload):
            with reading(upload.name, "zip file"), zipfile.ZipFile(upload) as packed:
                members = packed.infolist()
                if len(members) > MAX_MEMBERS or sum(member.file_size for member in members) > max_bytes:
                    raise InputError(
                        f"{upload.name}: the limit is {MAX_MEMBERS} files and {max_bytes} bytes when unpacked"
                    )
                packed.extractall(target)  # drops `..` and roots of names, and makes no links
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = scans_among(files, [*modalities, "seg"])
    for modality, scans in found.items():
        if len(scans) > 1:
            raise InputError(f"several scans are {modality}: {', '.join(path.name for path in scans)}")
    if not found:
        names = ", ".join(
            name for modality in modalities for name in ALIASES.get(canonical_modality(modality), [modality])
        )
        raise InputError(f"{', '.join(path.name for path in files[:3])}: no scan for this model: names end in {names}")
    return {modality: path for modality, (path,) in found.items()}
