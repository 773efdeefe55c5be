"""What a user without the package runs: `DiffusionPipeline.from_pretrained(.., trust_remote_code=True)`, many times over."""

import hashlib
import json
import os
import subprocess
import sys


def load_without_package(hub, home, *loads, **environment) -> list[dict]:
    """One process for `(name, options)` each: hash of the heatmaps, facts, and what publishing says; or the error.

    `leave=True` among the options takes the Hub away once the weights are there.
    """
    given = os.environ | hub.environment(home) | environment
    given = {name: value for name, value in given.items() if value is not None}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(loads), capture_output=True, text=True, env=given, cwd=home,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _load(name: str, leave: bool = False, **options) -> dict:
    import huggingface_hub
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    try:
        pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **options)
        pipe.set_progress_bar_config(disable=True)
        huggingface_hub.constants.HF_HUB_OFFLINE = leave or huggingface_hub.constants.HF_HUB_OFFLINE
        images = torch.rand(2, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
        found = {"heatmaps": hashlib.sha256(pipe(images).heatmaps.numpy().tobytes()).hexdigest()}
        found["facts"] = pipe.preprocessing
    except (OSError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        pipe.push_to_hub("user/other")
    except ImportError as error:
        return found | {"publish": str(error)}


if __name__ == "__main__":
    sys.modules["diffusers_cf"] = None  # no name of ours can be imported
    print(json.dumps([_load(name, **options) for name, options in json.load(sys.stdin)]))
