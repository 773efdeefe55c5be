"""How large the runs of `rented.py` are."""

import os
from dataclasses import dataclass


# rows of the benchmark: the model's ablation and its nearest rivals first
ROWS = {
    "diffusion": ("ours", "forward-map", "ours-clipped", "ours-unclipped", "cdpm-adagn", "cdpm-adagn-guided")
    + ("cdpm-healthy", "cdpm-classifier"),
    "others": ("threshold", "threshold-flair", "dae", "vae", "vae-restoration", "fanogan", "cam"),
}


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Attributes:
        data: options of `prepare` for phantoms.
        arrays: the same for real slices.
        train: options of the training script.
        batch_size: images a step.
        seconds: of the training on phantoms alone, if the call has as many.
        after: seconds of a call that are left to what comes after a training.
        rate: images a second, where nothing is measured.
        limit: most steps of it.
        tune: options for real slices, on which it is trained on.
        small: options of the training script for the shipped model, trained on from what it is.
        speed_of_training: options of `benchmarks/training_speed.py`.
        sweep: options of `sweep`.
        benchmark: options of `benchmark`.
        rows: of the benchmark, a command for each group.
        speed: options of `benchmarks/speed.py`.
        patient: whether it segments a whole scan, too, which takes a CPU half an hour.
    """

    data: tuple[str, ...]
    arrays: tuple[str, ...]
    train: tuple[str, ...]
    batch_size: int
    seconds: int
    after: int
    rate: float
    limit: int
    tune: tuple[str, ...]
    small: tuple[str, ...]
    speed_of_training: tuple[str, ...]
    sweep: tuple[str, ...]
    benchmark: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    speed: tuple[str, ...]
    patient: bool


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SIZES = {
    "smoke": Size(
        data=_words("--size 32 --patients 12"),
        arrays=_words("--size 32"),
        train=_words("--resolution 16 --unet_size small --checkpointing_steps 2 --num_validation_slices 4"),
        batch_size=4,
        seconds=1,
        after=0,
        rate=8,
        limit=4,
        tune=_words("--max_train_steps 2 --validation_steps 1 --num_validation_slices 4"),
        small=_words("--train_batch_size 4 --max_train_steps 2 --crop_background 0.7 --validation_steps 0"),
        speed_of_training=_words("--unet_size small --resolution 16 --batch_size 4 --steps 1 --rounds 1"),
        sweep=_words(
            "--guidance_scales 3 --strengths 0.5 --maps counterfactual --num_inference_steps 4 --max_slices 4"
        ),
        benchmark=_words("--preset smoke"),
        rows={"diffusion": ("ours",), "others": ("threshold-flair", "cam")},
        speed=_words("--unet_size small --max_slices 1 --rounds 1"),
        patient=False,
    ),
    # Eight times the paper's rate for four times its batch, since a thousand steps must do; not tried yet.
    "paper": Size(
        data=(*_words("--size 128 --num_workers"), str(os.cpu_count())),
        arrays=(),
        train=_words(
            "--resolution 64 --unet_size paper --learning_rate 8e-4 --lr_scheduler cosine --lr_warmup_steps 150"
            " --snr_gamma 5 --first_timesteps 0.2 --mixed_precision bf16 --compile --dataloader_num_workers 12"
            " --checkpointing_steps 250 --checkpoints_total_limit 1 --num_validation_slices 64"
        ),
        batch_size=128,
        seconds=270,
        after=170,
        rate=900,
        limit=50_000,
        tune=_words(
            "--max_train_steps 600 --learning_rate 2e-4 --lr_scheduler cosine --lr_warmup_steps 50 --snr_gamma 5 --augment"
            " --mixed_precision bf16 --dataloader_num_workers 12 --checkpointing_steps 200 --checkpoints_total_limit 1"
            " --validation_steps 300 --num_validation_slices 64"
        ),
        small=_words(
            "--train_batch_size 512 --max_train_steps 1000 --crop_background 0.7 --learning_rate 2e-3 --lr_scheduler cosine"
            " --lr_warmup_steps 200 --snr_gamma 5 --mixed_precision bf16 --random_flip --dataloader_num_workers 12"
            " --checkpointing_steps 500 --checkpoints_total_limit 1 --validation_steps 500"
        ),
        speed_of_training=_words(
            "--unet_size paper --batch_size 128 --steps 20 --rounds 2 --dataloader_num_workers 12 --compile"
        ),
        # one core sorts the scores of every setting, which takes longer than the passes
        sweep=_words(
            "--guidance_scales 3 6 9 --strengths 0.75 --maps reconstruction forward --num_inference_steps 8"
            " --solver_order 1 2 --max_slices 128 --batch_size 128"
        ),
        benchmark=_words(
            "--preset paper --train_seconds 240 --num_inference_steps 20 --strengths 0.5 0.75 --dtype bfloat16"
        ),
        rows=ROWS,
        speed=_words("--unet_size paper --batch_size 512 --max_slices 64 --rounds 2 --dtype bfloat16"),
        patient=True,
    ),
}
