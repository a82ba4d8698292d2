#!/usr/bin/env bash
# A peer: FlowPure-Gauss (arXiv 2505.13280): no attacks, a flow from noise to clean.
source "$(dirname "$0")/common.sh"
stage codefend train flowpure-gauss --run "$RUNS/flowpure-gauss" --set "prior=$PRIOR"
echo "done: $RUNS/flowpure-gauss/weights"
