#!/usr/bin/env bash
# Peer: TeCoA-style (arXiv 2212.07016), a pocket victim with an image encoder fine-tuned adversarially, words as labels.
source "$(dirname "$0")/common.sh"
stage codefend train tecoa --run "$RUNS/tecoa" --set "victim=$POCKET"
echo "done: $RUNS/tecoa/weights"
