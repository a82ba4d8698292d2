#!/usr/bin/env bash
# The victim smolvlm-pocket: distillation from the pocket, then captions and questions; and its complete checkpoint.
source "$(dirname "$0")/common.sh"
settings $([ "$POCKET" = pocket ] || echo "teacher=$POCKET")
stage codefend train smolvlm-pocket --run "$RUNS/smolvlm-pocket" "${options[@]}"
[ -e "$RUNS/smolvlm-checkpoint" ] ||
  codefend build-victim smolvlm-pocket --weights "$RUNS/smolvlm-pocket/weights" -o "$RUNS/smolvlm-checkpoint"
echo "done: $RUNS/smolvlm-pocket/weights, and hf:$RUNS/smolvlm-checkpoint"
