#!/usr/bin/env bash
# The bridge trained on against attacks on the language-model loss, three sign steps through itself; behind much noise
# scenes may lose more detail. Two hours of one core with bfloat16 units. Needs the canvases of `recipes/bridge.sh` or
# draws its own. The result is recipes/checkpoints/bridge-answers.
source "$(dirname "$0")/common.sh"
zoo=recipes/checkpoints/encoder
settings "prior=$BRIDGE" teacher=recipes/checkpoints/teacher-large "victim=$POCKET" \
  "zoo=$zoo-vit16,$zoo-convnet,$zoo-vgg" "natural.cache=$RUNS/canvases.safetensors" steps=2600 seed=4 words=0.6 \
  words_batch=8 w_words=1.6 batches=32,16,8 bare=0.3 damage=0.05 high_sigma=0.04,0.25 lr=4e-4 sigma=0.05 strength=1.15 \
  save_every=100 answers=0.25 adaptive_steps=3 faithful_sigma=0.05
stage codefend train robust --run "$RUNS/bridge-answers" "${options[@]}"
echo "done: $RUNS/bridge-answers/weights"
