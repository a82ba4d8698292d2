#!/usr/bin/env bash
# Encoders of three other families, imitations of EfficientNet-Lite2 in small: both bridges are attacked in training
# through them.
source "$(dirname "$0")/common.sh"

for family in vit16:600 convnet:450 vgg:450; do
  settings family="${family%:*}" images=4800 steps="${family#*:}" "natural.cache=$RUNS/canvases.safetensors" \
    "cache=$RUNS/teacher-maps.safetensors"
  stage codefend train encoder --run "$RUNS/encoder-${family%:*}" "${options[@]}"
done
echo "done: $RUNS/encoder-vit16, $RUNS/encoder-convnet, $RUNS/encoder-vgg"
