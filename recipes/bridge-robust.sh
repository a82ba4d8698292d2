#!/usr/bin/env bash
# The bridge behind noise, for attackers who see it: fine-tuned from the bridge, most pairs mined. Needs bridge.sh.
source "$(dirname "$0")/common.sh"
stage codefend train bridge-robust --run "$RUNS/bridge-robust" --set "pairs=$RUNS/pairs" --set "victim=$POCKET" \
  --set "prior=$RUNS/bridge/weights"
echo "done: $RUNS/bridge-robust/weights"
