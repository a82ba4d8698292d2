#!/usr/bin/env bash
# The shipped bridge-large, from the prior in one command: the recipes of its stages, then one training from its teacher
# for noise, mostly on oblivious attacks, then the detection score. TEACHER as in bridge.sh.
source "$(dirname "$0")/common.sh"

before_robust
bridge="$RUNS/bridge-large"
settings "prior=$TEACHER" "teacher=$TEACHER" "zoo=$ZOO" "victim=$POCKET" "natural.cache=$RUNS/canvases.safetensors" \
  channels=64,128,192,256 blocks=2,2,4,2 steps=2000 seed=2 words=0.1 bare=0.85 bare_steps=8 damage=0.03 taught=0.3 \
  noise_free=0.25 low_sigma=0.008,0.05 lr=1e-4 save_every=20 sigma=0.05 strength=1.15
stage codefend train robust --run "$bridge" "${options[@]}"
stage codefend calibrate "$bridge/weights" --set "pairs=$RUNS/pairs-held-out"
echo "done: $bridge/weights"
