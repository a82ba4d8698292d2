#!/usr/bin/env bash
# The shipped bridge-coarse: guided by words alone, at larger noise. One training from the bridge, then the detection
# score. Needs bridge.sh.
source "$(dirname "$0")/common.sh"

bridge="$RUNS/bridge-coarse"
CONFIG=recipes/bridge-replay.toml training bridge "$bridge" "$RUNS/bridge/weights" "$RUNS/pairs-a,$RUNS/pairs-d" seed=11 steps=4000 save_every=80 \
  replay=8 replay_step=0.35 mined=0.6 max_eps=12/255 answers=0 w_answers=0 noise_free=0 min_sigma=0.08 max_sigma=0.2 \
  at_one=1 clean=0.0625 w_bridge=4 w_identity=0 w_features=0 w_direction=0 w_words=1 lr=8e-4 warmup=30
stage codefend calibrate "$bridge/weights" --set "pairs=$RUNS/pairs-held-out"
echo "done: $bridge/weights"
