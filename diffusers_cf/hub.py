"""A trained model's way to the Hub; its repository is made before the training, not after it."""

from pathlib import Path

from huggingface_hub import create_repo
from huggingface_hub.errors import HTTPError

from diffusers_cf.errors import InputError
from diffusers_cf.pipeline_counterfactual_ddim import CounterfactualDDIMPipeline


def create_model_repository(name: str, token: str | None = None, private: bool | None = None) -> str:
    """Makes a model repository on the Hub unless it exists.

    Args:
        name (`str`): `name` or `user/name`.
        token (`str`, *optional*): instead of the one that `hf auth login` stored.
        private (`bool`, *optional*): who may read a new repository; None = as the account's default has it.

    Returns:
        `user/name`.

    Raises:
        InputError: the name is not allowed, there is no token, it may not write there, or the Hub can't be reached.
    """
    try:
        return create_repo(name, token=token, private=private, exist_ok=True).repo_id
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{name}: no repository to push to ({_reason(error)}); `hf auth login` stores a token"
        ) from None


def push_model(folder: str | Path, repo_id: str, token: str | None = None) -> None:
    """Pushes a model folder to its repository.

    Raises:
        InputError: the Hub did not take it; the folder is whole as before.
    """
    pipe = CounterfactualDDIMPipeline.from_pretrained(folder)
    try:
        pipe.push_to_hub(repo_id, token=token)
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(f"{folder}: is whole, but could not be pushed to {repo_id} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
