#!/usr/bin/env bash
# A peer: ADBM (arXiv 2408.00315): a bridge at large noise, perturbations made in the loop.
source "$(dirname "$0")/common.sh"
stage codefend train adbm --run "$RUNS/adbm" --set "victim=$POCKET" --set "prior=$PRIOR"
echo "done: $RUNS/adbm/weights"
