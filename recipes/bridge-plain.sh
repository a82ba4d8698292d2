#!/usr/bin/env bash
# The bridge in one training, with the peers' steps and bank, for the comparison of methods. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
stage codefend train bridge --run "$RUNS/bridge-plain" --set "pairs=$RUNS/pairs" --set "victim=$POCKET" \
  --set "prior=$PRIOR"
echo "done: $RUNS/bridge-plain/weights"
