#!/usr/bin/env bash
# The pocket's vision tokens for photographs: a gate, and tokens that carry class names.
source "$(dirname "$0")/common.sh"
settings $([ "$POCKET" = pocket ] || echo "victim=$POCKET")
stage codefend train pocket-photographs --run "$RUNS/pocket-photographs" "${options[@]}"
echo "done: $RUNS/pocket-photographs/weights"
