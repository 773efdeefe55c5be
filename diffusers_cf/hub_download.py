"""What downloads of models and of data sets share: asking the Hub first, and its refusals in one line."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,  # base class of the client's network errors, whichever HTTP library it was built on
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import InputError


logger = logging.getLogger(__name__)


def listed_files(
    info: Callable, repo_id: str, revision: str | None, token: str | bool | None, must_answer: bool = False
) -> dict[str, int | None] | None:
    """A repository's files and how many bytes each has, where the Hub says it; None where it doesn't answer.

    Asked first because this is one call: the client's other calls try for half a minute before they give up.

    Args:
        info (`Callable`): `huggingface_hub.model_info` or `dataset_info`.
        repo_id (`str`): `user/name`.
        revision (`str`, *optional*): branch, tag or commit.
        token (`str` or `bool`, *optional*): the default is the token of the log-in.
        must_answer (`bool`): raise the client's error where the Hub doesn't answer.
    """
    try:
        answer = info(repo_id, revision=revision, token=token, files_metadata=True)
        return {file.rfilename: file.size for file in answer.siblings}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (HTTPError, OSError) as error:
        if must_answer:
            raise
        logger.warning("%s: the Hub can't be asked (%s), using the local cache", repo_id, one_line(error))
        return None


@contextmanager
def refusals_in_one_line(repo_id: str, revision: str | None, without: str) -> Iterator[None]:
    """Within this context the client's errors become `InputError`.

    Args:
        repo_id (`str`): what was asked for, for the message.
        revision (`str`, *optional*): likewise.
        without (`str`): what it means that a file is missing.
    """
    try:
        yield
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise InputError(f"{repo_id}: {_why_missing(error, revision, without)}") from error
    except (HTTPError, OSError) as error:
        raise InputError(f"{repo_id}: the download failed: {one_line(error)}") from error


def _why_missing(error: Exception, revision: str | None, without: str) -> str:
    if isinstance(error, HFValidationError):
        return "neither a folder nor a repository id like user/name"
    if isinstance(error, RepositoryNotFoundError):
        return "neither a folder nor a repository on the Hub that this token may read (run `hf auth login`?)"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}"
    if isinstance(error, LocalEntryNotFoundError):
        return "not a folder, not in the local cache, and the Hub can't be reached or was not to be asked"
    return without


def one_line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
