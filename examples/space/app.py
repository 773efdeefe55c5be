"""The page of `diffusers-cf app` as a Hugging Face Space; MODEL may name another model than the one that ships."""

import os

from diffusers_cf.cli import main


if __name__ == "__main__":
    model = ["--model", os.environ["MODEL"]] if os.environ.get("MODEL") else []
    # a Space's own proxy is the only one that reaches this port
    raise SystemExit(main(["app", "--host", "0.0.0.0", "--port", "7860", *model]))
