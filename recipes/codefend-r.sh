#!/usr/bin/env bash
# A peer: CoDefend-R, our reconstruction of arXiv 2510.11096: static pairs, directional. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
stage codefend train codefend-r --run "$RUNS/codefend-r" --set "pairs=$RUNS/pairs" --set "victim=$POCKET" --set "prior=$PRIOR"
echo "done: $RUNS/codefend-r/weights"
