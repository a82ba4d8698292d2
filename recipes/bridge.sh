#!/usr/bin/env bash
# The shipped bridge: four trainings, each from the weights of the previous one, then the detection score. Needs pairs.sh.
# In one training, like the peers: bridge-plain.sh.
source "$(dirname "$0")/common.sh"

bridge="$RUNS/bridge"
a="$RUNS/pairs-a" b="$RUNS/pairs-b" c="$RUNS/pairs-c" d="$RUNS/pairs-d" e="$RUNS/pairs-e" f="$RUNS/pairs-f"
training bridge "$bridge-1" "$PRIOR" "$RUNS/pairs" steps=900
training bridge "$bridge-2" "$bridge-1/weights" "$a,$b,$b,$b,$b" steps=1800 w_identity=8 clean=0.2 mined=0.35 lean=true \
  mining_steps=2 answers=0.2 answers_batch=4 w_answers=0.1 lr=6e-4 w_words=0.4
CONFIG=recipes/bridge-robust.toml training bridge "$bridge-3" "$bridge-2/weights" "$a,$b,$b,$c,$c" seed=3
# PHOTOGRAPHS: as in pairs.sh.
CONFIG=recipes/bridge-replay.toml training bridge "$bridge" "$bridge-3/weights" "$a,$d,$f,$f,$c,$c,$e,$e,$e" seed=9 \
  "photographs=${PHOTOGRAPHS:-}"
stage codefend calibrate "$bridge/weights" --set "pairs=$RUNS/pairs-held-out"
echo "done: $bridge/weights"
