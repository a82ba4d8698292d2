#!/usr/bin/env bash
# The shipped bridge-transfer-large: bridge-large trained on for noise, mostly on oblivious attacks. One training, then the
# detection score. Needs bridge-transfer.sh for its encoders.
source "$(dirname "$0")/common.sh"

start="${LARGE:-src/codefend/weights/bridge-large}" bridge="$RUNS/bridge-transfer-large"
settings "prior=$start" "teacher=$start" "zoo=$RUNS/encoder-vit16/weights,$RUNS/encoder-convnet/weights" "victim=$POCKET" \
  "natural.cache=$RUNS/canvases.safetensors" channels=64,128,192,256 blocks=2,2,4,2 steps=2000 seed=2 words=0.1 bare=0.85 bare_steps=8 \
  damage=0.03 taught=0.3 noise_free=0.25 low_sigma=0.008,0.05 lr=1e-4 save_every=20
stage codefend train robust --run "$bridge" "${options[@]}"
stage codefend calibrate "$bridge/weights" --set "pairs=$RUNS/pairs-held-out"
echo "done: $bridge/weights"
