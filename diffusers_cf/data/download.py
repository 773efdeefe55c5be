"""Download a slice data set from the Hub: `user/name`, or `user/name@revision` for a branch, tag or commit."""

import re
from pathlib import Path

from diffusers_cf.data.preprocessing import PREPROCESSING_FILE
from diffusers_cf.errors import InputError
from diffusers_cf.loading import download


SPLITS_FILE = "splits.json"
_NAME = re.compile(r"(?P<repo_id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>.+))?")


def dataset_folder(name: str | Path, split: str) -> tuple[Path, str | None]:
    """Return the folder of a data set; download preprocessing.json and one split if it is a name on the Hub.

    Args:
        name (`str` or `Path`): an existing folder, or else `user/name[@revision]`.
        split (`str`): the split to download.

    Returns:
        The folder, and the commit if it was downloaded.

    Raises:
        InputError: the repository, its revision or files of it are missing, or the download fails.
    """
    match = _NAME.fullmatch(str(name))
    if Path(name).is_dir() or isinstance(name, Path) or not match:
        return Path(name), None

    def choose(names: list[str], _: dict) -> list[str]:
        if PREPROCESSING_FILE not in names:
            raise InputError(f"{name}: the repository has no {PREPROCESSING_FILE}, so it is no slice data set")
        if SPLITS_FILE in names and not any(file.endswith(".parquet") for file in names):
            raise InputError(
                f"{name}: holds no images, because their license forbids it: prepare your own copy with its"
                f" {SPLITS_FILE}, as its README.md says"
            )
        return [PREPROCESSING_FILE, f"data/{split}-*.parquet"]

    folder = Path(download(match["repo_id"], choose, match["revision"], repo_type="dataset"))
    return folder, folder.name
