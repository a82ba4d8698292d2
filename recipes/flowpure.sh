#!/usr/bin/env bash
# Peer: FlowPure-PGD (arXiv 2505.13280), a flow from adversarial to clean images, on static pairs. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
stage codefend train flowpure --run "$RUNS/flowpure" --set "pairs=$RUNS/pairs" --set "prior=$PRIOR"
echo "done: $RUNS/flowpure/weights"
