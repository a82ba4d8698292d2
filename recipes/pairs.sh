#!/usr/bin/env bash
# The banks of pairs: one to train on, one of other pictures to calibrate detection scores on.
source "$(dirname "$0")/common.sh"
stage codefend pairs --run "$RUNS/pairs" --set "victim=$POCKET"
stage codefend pairs --run "$RUNS/pairs-held-out" --set "victim=$POCKET" --set seed=1 --set count=640
echo "done: $RUNS/pairs, $RUNS/pairs-held-out"
