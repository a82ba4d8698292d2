#!/usr/bin/env bash
# Peer: CoDefend-R, our reconstruction of arXiv 2510.11096, on static pairs. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
stage codefend train codefend-r --run "$RUNS/codefend-r" --set "pairs=$RUNS/pairs" --set "victim=$POCKET" --set "prior=$PRIOR"
echo "done: $RUNS/codefend-r/weights"
