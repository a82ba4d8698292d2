#!/usr/bin/env bash
# The unconditional diffusion prior: DiffPure's denoiser, and the initial weights of bridge and peers.
source "$(dirname "$0")/common.sh"
stage codefend train prior --run "$RUNS/prior"
echo "done: $RUNS/prior/weights"
