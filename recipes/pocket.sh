#!/usr/bin/env bash
# The pocket victim, in two trainings; the second continues with another seed.
source "$(dirname "$0")/common.sh"
stage codefend train pocket --run "$RUNS/pocket"
stage codefend train pocket --run "$RUNS/pocket-2" --set "init=$RUNS/pocket/weights" --set seed=1 \
  --set grounding_scenes=3008 --set grounding_shapes=3008 --set grounding_epochs=4 --set lr_grounding=5e-4 \
  --set steps=330 --set lr_connector=3e-4 --set lr_lora=4e-4 --set warmup=20
echo "done: $RUNS/pocket-2/weights"
