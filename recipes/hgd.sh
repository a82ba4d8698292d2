#!/usr/bin/env bash
# A peer: HGD (arXiv 1712.02976): static pairs, the encoders' features kept. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
stage codefend train hgd --run "$RUNS/hgd" --set "pairs=$RUNS/pairs" --set "prior=$PRIOR"
echo "done: $RUNS/hgd/weights"
