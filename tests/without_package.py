"""What a user without the package runs: `DiffusionPipeline.from_pretrained(.., trust_remote_code=True)`."""

import hashlib
import json
import os
import subprocess
import sys


def load_without_package(hub, home, *loads) -> list[dict]:
    """Return for each `(name, options)` the hash of the heatmaps and the facts; one process for all."""
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(loads), capture_output=True, text=True, cwd=home, check=False,
        env=os.environ | hub.environment(home),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _load(name: str, **options) -> dict:
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"heatmaps": sha256(pipe(images).heatmaps.numpy().tobytes()), "facts": pipe.preprocessing}


if __name__ == "__main__":
    sys.modules["diffusers_cf"] = None  # no name of ours can be imported
    print(json.dumps([_load(name, **options) for name, options in json.load(sys.stdin)]))
