#!/usr/bin/env bash
# A bridge for any noise level, in one training from given weights, attacked in the loop through encoders of several families:
# the encoders of FAMILIES first, then the bridge. START: the initial weights.
source "$(dirname "$0")/common.sh"
START="${START:-src/codefend/weights/bridge-detail}" FAMILIES="${FAMILIES:-vit16}"
canvases="natural.cache=$RUNS/canvases.safetensors" zoo=""
for family in $FAMILIES; do
  settings family="$family" images=4800 steps=600 "$canvases" "cache=$RUNS/teacher-maps.safetensors"
  stage codefend train encoder --run "$RUNS/encoder-$family" "${options[@]}"
  zoo+="$RUNS/encoder-$family/weights,"
done
settings "prior=$START" "teacher=$START" "zoo=${zoo%,}" "victim=$POCKET" "$canvases"
stage codefend train robust --run "$RUNS/robust" "${options[@]}"
echo "done: $RUNS/robust/weights"
