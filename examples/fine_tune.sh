#!/usr/bin/env bash
# A published model made at home on one's own scanner, a stage a command; see docs/tutorials/fine-tune.md.
#   MODEL=user/name SCANS=folder examples/fine_tune.sh prepare     # -> WORK/data
#   MODEL=user/name examples/fine_tune.sh train                    # -> WORK/model, with a threshold
#   MODEL=user/name SCANS=folder examples/fine_tune.sh compare     # -> WORK/before, WORK/after: both models' maps
set -euo pipefail
STAGE=${1:?"which stage: prepare, train or compare"}
MODEL=${MODEL:?"which model to begin with: MODEL=folder or Hub id"}
WORK=${WORK:-fine_tuned}
STEPS=${STEPS:-1000}
SIZE=${SIZE:-128}
NORMALIZE=${NORMALIZE:-median}
shift

case $STAGE in
  prepare)
    # LABELS: a CSV with patient, slice and label; without it the labels come from segmentations beside the scans.
    # MODALITIES: those of the model, or the ones there are of them, if they aren't flair t1 t1ce t2
    diffusers-cf prepare --source brats --input "${SCANS:?"where the patients are: SCANS=folder"}" --size "$SIZE" \
      ${LABELS:+--labels "$LABELS"} ${MODALITIES:+--modalities $MODALITIES} --normalize "$NORMALIZE" --output "$WORK/data" "$@" ;;
  train)
    # --renormalize: the new model takes the data's intensity scale, whatever the old one's is
    accelerate launch --num_processes 1 "$(dirname "$0")/../train_counterfactual.py" --pretrained_model "$MODEL" --renormalize \
      --dataset "$WORK/data" --output_dir "$WORK/model" --max_train_steps "$STEPS" --learning_rate 2e-4 \
      --lr_scheduler cosine --lr_warmup_steps "$((STEPS / 20))" --ema_max_decay 0.999 --mixed_precision auto \
      --random_flip --augment --snr_gamma 5 --validation_steps 0 "$@"
    diffusers-cf calibrate --model "$WORK/model" --dataset "$WORK/data" --output "$WORK/threshold.json" --store ;;
  compare)
    # COMPARE=after: the new model alone, where patients lack a modality that the old one takes
    for name in ${COMPARE:-before after}; do
      model=$([ "$name" = before ] && echo "$MODEL" || echo "$WORK/model")
      diffusers-cf segment "${SCANS:?"where the patients are: SCANS=folder"}" --model "$model" --output "$WORK/$name" "$@"
      diffusers-cf report "$WORK/$name" --scans "$SCANS" --output "$WORK/$name.html"
    done ;;
  *)
    echo "$STAGE: no such stage; there are prepare, train and compare" >&2; exit 2 ;;
esac
