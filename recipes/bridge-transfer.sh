#!/usr/bin/env bash
# The shipped bridge-transfer, a bridge for any noise level and for models that it was not trained on: encoders of other
# families first, then two trainings from bridge-detail, attacked in the loop through all of these encoders, then the
# detection score. Needs pairs.sh (for the held-out bank).
source "$(dirname "$0")/common.sh"

canvases="natural.cache=$RUNS/canvases.safetensors" large="${LARGE:-src/codefend/weights/bridge-large}"
for family in vit16:600 convnet:450 vgg:450; do
  settings family="${family%:*}" images=4800 steps="${family#*:}" "$canvases" "cache=$RUNS/teacher-maps.safetensors"
  stage codefend train encoder --run "$RUNS/encoder-${family%:*}" "${options[@]}"
done
zoo="$RUNS/encoder-vit16/weights"
start="${START:-src/codefend/weights/bridge-detail}" bridge="$RUNS/bridge-transfer"
settings "prior=$start" "teacher=$start" "zoo=$zoo" "victim=$POCKET" "$canvases"
stage codefend train robust --run "$bridge-1" "${options[@]}"
settings "prior=$bridge-1/weights" "teacher=$large" "zoo=$zoo,$RUNS/encoder-convnet/weights,$RUNS/encoder-vgg/weights" \
  "victim=$POCKET" "$canvases" steps=3200 bare=0.7 damage=0.05 save_every=25
stage codefend train robust --run "$bridge" "${options[@]}"
stage codefend calibrate "$bridge/weights" --set "pairs=$RUNS/pairs-held-out"
echo "done: $bridge/weights"
