#!/usr/bin/env bash
# The shipped bridge, from the prior in one command: the recipes of its stages, then three trainings from bridge-detail
# for any noise level, attacked in the loop through five encoders of four families, the last mostly through itself, then the
# detection score. Its teacher wants a GPU: with TEACHER=recipes/checkpoints/teacher-large it starts from the shipped
# bridge-detail, with no GPU and fewer banks.
source "$(dirname "$0")/common.sh"

before_robust
bridge="$RUNS/bridge" common=("victim=$POCKET" "natural.cache=$RUNS/canvases.safetensors")
settings "prior=$START" "teacher=$START" "zoo=$RUNS/encoder-vit16/weights" "${common[@]}"
stage codefend train robust --run "$bridge-1" "${options[@]}"
common+=("teacher=$TEACHER" "zoo=$ZOO,$RUNS/encoder-vgg/weights" damage=0.05 sigma=0.05 strength=1.15)
settings "prior=$bridge-1/weights" "${common[@]}" steps=3200 bare=0.7 save_every=25
stage codefend train robust --run "$bridge-2" "${options[@]}"
settings "prior=$bridge-2/weights" "${common[@]}" steps=4800 seed=3 words=0.4 words_batch=8 batches=32,16,8 bare=0.3 \
  high_sigma=0.04,0.25 lr=4e-4 save_every=100
stage codefend train robust --run "$bridge" "${options[@]}"
stage codefend calibrate "$bridge/weights" --set "pairs=$RUNS/pairs-held-out"
echo "done: $bridge/weights"
