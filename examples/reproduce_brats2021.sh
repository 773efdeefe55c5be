#!/usr/bin/env bash
# Tables 1 and 2 and Fig. 1 to 4 on BraTS 2021, a stage a command; see docs/tutorials/paper.md.
#   examples/reproduce_brats2021.sh prepare    # BRATS (a folder a patient) -> WORK/data
#   examples/reproduce_brats2021.sh benchmark  # WORK/data -> WORK/results, goes on where it stopped
# PRESET=smoke PATIENTS_WANTED=any try the way through in minutes, on any patients in BraTS layout.
set -euo pipefail
STAGE=${1:?"which stage: prepare or benchmark"}
BRATS=${BRATS:-BraTS2021_Training_Data}
WORK=${WORK:-brats2021}
PRESET=${PRESET:-paper}
SIZE=${SIZE:-128}
PATIENTS_WANTED=${PATIENTS_WANTED:-1251}
shift

case $STAGE in
  prepare)
    [ -d "$BRATS" ] || { echo "$BRATS: no such folder; say where the patients are: BRATS=FOLDER" >&2; exit 2; }
    found=$(find "$BRATS" -mindepth 1 -maxdepth 1 -type d | wc -l)
    if [ "$PATIENTS_WANTED" != any ] && [ "$found" != "$PATIENTS_WANTED" ]; then
      echo "$BRATS: $found patients, BraTS 2021 has $PATIENTS_WANTED; another number is another split" >&2
      exit 2
    fi
    diffusers-cf prepare --source brats --input "$BRATS" --size "$SIZE" --seed 0 --normalize p99 --output "$WORK/data" "$@" ;;
  benchmark)
    diffusers-cf benchmark --dataset "$WORK/data" --preset "$PRESET" --output "$WORK/results" "$@" ;;
  *)
    echo "$STAGE: no such stage; there are prepare and benchmark" >&2; exit 2 ;;
esac
