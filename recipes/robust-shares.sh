#!/usr/bin/env bash
# A short training for any noise level from the shipped prior: three seeds, and each source of training images left out.
# Needs encoders.sh. Judge the six with benchmarks/families.py.
source "$(dirname "$0")/common.sh"
zoo="$RUNS/encoder-vit16/weights,$RUNS/encoder-convnet/weights,$RUNS/encoder-vgg/weights"
short() { # name, settings
  local run="$RUNS/robust-shares/$1"
  shift
  settings "teacher=recipes/checkpoints/teacher-large" "zoo=$zoo" "victim=$POCKET" "natural.cache=$RUNS/canvases.safetensors" \
    steps=300 lr=6e-4 bare=0.7 damage=0.05 save_every=100 "$@"
  stage codefend train robust --run "$run" "${options[@]}"
}
for seed in 0 1 2; do
  short "seed-$seed" "seed=$seed"
done
short no-leaves natural.shares=0,0.25,0.25
short no-photographs natural.shares=0.5,0,0.25
short no-scenes natural.shares=0.5,0.25,0
echo "done: $RUNS/robust-shares"
