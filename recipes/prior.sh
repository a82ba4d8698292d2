#!/usr/bin/env bash
# The unconditional diffusion prior: what DiffPure denoises with, and where bridge and peers start from.
source "$(dirname "$0")/common.sh"
stage codefend train prior --run "$RUNS/prior"
echo "done: $RUNS/prior/weights"
