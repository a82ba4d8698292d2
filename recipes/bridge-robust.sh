#!/usr/bin/env bash
# The bridge behind noise, for attackers who see it: from the bridge's second training on, most pairs mined. Needs
# bridge.sh.
source "$(dirname "$0")/common.sh"
b="$RUNS/pairs-b" c="$RUNS/pairs-c"
stage codefend train bridge-robust --run "$RUNS/bridge-robust" --set "prior=$RUNS/bridge-2/weights" --set seed=3 \
  --set "pairs=$RUNS/pairs-a,$b,$b,$c,$c" --set "victim=$POCKET"
echo "done: $RUNS/bridge-robust/weights"
