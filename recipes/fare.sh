#!/usr/bin/env bash
# A peer: FARE (arXiv 2402.12336): the pocket with an adversarially fine-tuned image encoder, a victim of its own.
source "$(dirname "$0")/common.sh"
stage codefend train fare --run "$RUNS/fare" --set "victim=$POCKET"
echo "done: $RUNS/fare/weights"
