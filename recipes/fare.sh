#!/usr/bin/env bash
# Peer: FARE (arXiv 2402.12336), a pocket victim with an adversarially fine-tuned image encoder.
source "$(dirname "$0")/common.sh"
stage codefend train fare --run "$RUNS/fare" --set "victim=$POCKET"
echo "done: $RUNS/fare/weights"
