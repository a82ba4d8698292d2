#!/usr/bin/env bash
# Peer: ADBM (arXiv 2408.00315), a bridge at large noise with perturbations made in the training loop.
source "$(dirname "$0")/common.sh"
stage codefend train adbm --run "$RUNS/adbm" --set "victim=$POCKET" --set "prior=$PRIOR"
echo "done: $RUNS/adbm/weights"
