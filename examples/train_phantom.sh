#!/usr/bin/env bash
# Trains the small model on the phantom, chooses its settings on validation patients, measures it on test patients.
# The shipped model began so, and went on in windows, on a GPU: its card has both commands. --crop_background 0.7 here
# does both at once.
# STEPS=20 PATIENTS=4 try the way through in minutes; the defaults need some hours on two cores.
set -euo pipefail
OUT=${OUT:-phantom_run}
STEPS=${STEPS:-7500}
PATIENTS=${PATIENTS:-340}
GRID=${GRID:-8}
SLICES=${SLICES:-128}

diffusers-cf prepare --source phantom --patients "$PATIENTS" --size 64 --output "$OUT/train_data"
diffusers-cf prepare --source phantom --patients "$PATIENTS" --size 128 --output "$OUT/data"
accelerate launch --num_processes 1 "$(dirname "$0")/../train_counterfactual.py" \
  --dataset "$OUT/train_data" --output_dir "$OUT/model" --max_train_steps "$STEPS" \
  --mixed_precision auto --random_flip --snr_gamma 5 --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 200 \
  --validation_steps 0
diffusers-cf sweep --model "$OUT/model" --dataset "$OUT/data" --output "$OUT/sweep" \
  --guidance_scales 3 6 9 12 --strengths 0.5 0.75 --maps counterfactual reconstruction forward \
  --num_inference_steps "$GRID" --solver_order 1 2 --max_evaluations 24 --max_slices "$SLICES" --store
diffusers-cf evaluate --model "$OUT/model" --dataset "$OUT/data" --output "$OUT/model.json"
diffusers-cf evaluate --method threshold-flair --dataset "$OUT/data" --output "$OUT/threshold-flair.json"
