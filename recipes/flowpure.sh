#!/usr/bin/env bash
# A peer: FlowPure-PGD (arXiv 2505.13280): static pairs, a flow from attacked to clean. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
stage codefend train flowpure --run "$RUNS/flowpure" --set "pairs=$RUNS/pairs" --set "prior=$PRIOR"
echo "done: $RUNS/flowpure/weights"
