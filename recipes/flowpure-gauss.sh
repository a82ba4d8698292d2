#!/usr/bin/env bash
# Peer: FlowPure-Gauss (arXiv 2505.13280), a flow from noisy to clean images, trained without attacks.
source "$(dirname "$0")/common.sh"
stage codefend train flowpure-gauss --run "$RUNS/flowpure-gauss" --set "prior=$PRIOR"
echo "done: $RUNS/flowpure-gauss/weights"
