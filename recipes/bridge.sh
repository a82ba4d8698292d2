#!/usr/bin/env bash
# The bridge: fine-tuned from the prior on static and mined pairs, then its detection score. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
stage codefend train bridge --run "$RUNS/bridge" --set "pairs=$RUNS/pairs" --set "victim=$POCKET" --set "prior=$PRIOR"
stage codefend calibrate "$RUNS/bridge/weights" --set "pairs=$RUNS/pairs-held-out"
echo "done: $RUNS/bridge/weights"
