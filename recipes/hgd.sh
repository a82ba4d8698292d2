#!/usr/bin/env bash
# Peer: HGD (arXiv 1712.02976), guided by encoders' features, on static pairs. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
stage codefend train hgd --run "$RUNS/hgd" --set "pairs=$RUNS/pairs" --set "prior=$PRIOR"
echo "done: $RUNS/hgd/weights"
