#!/usr/bin/env bash
# Peer: FARE (arXiv 2402.12336), a pocket victim with an adversarially fine-tuned image encoder.
source "$(dirname "$0")/common.sh"
# 1,790 steps of 16 images are the paper's budget in proportion to the parameters of the encoder (2.56 M images for 304 M).
stage codefend train fare --run "$RUNS/fare" --set "victim=$POCKET" --set steps=1790 --set warmup=125
echo "done: $RUNS/fare/weights"
