#!/usr/bin/env bash
# The shipped bridge-detail, without noise: ten trainings from the prior, the ninth in a wider network and the tenth with
# other views of the images, then the detection score. Needs pairs.sh; PHOTOGRAPHS as there.
source "$(dirname "$0")/common.sh"

bridge="$RUNS/bridge-detail"
a="$RUNS/pairs-a" b="$RUNS/pairs-b" c="$RUNS/pairs-c" d="$RUNS/pairs-d" e="$RUNS/pairs-e" f="$RUNS/pairs-f"
late=(noise_free=0.8 at_one=0.9 warmup=20)
short=("${late[@]}" clean=0.35 lean=true mining_steps=2 lr=3e-4 w_words=0.6)
training bridge "$bridge-1" "$PRIOR" "$RUNS/pairs" steps=900
training bridge "$bridge-2" "$bridge-1/weights" "$a,$b,$b,$b,$b" steps=1800 w_identity=8 clean=0.2 mined=0.35 lean=true \
  mining_steps=2 answers=0.2 answers_batch=4 w_answers=0.1 lr=6e-4 w_words=0.4
training bridge "$bridge-3" "$bridge-2/weights" "$a,$b,$b,$b,$b" "${short[@]}" steps=320 seed=1 w_identity=24 mined=0.2
training bridge "$bridge-4" "$bridge-3/weights" "$a,$b,$b,$b,$c,$c,$c" "${short[@]}" steps=420 seed=2 w_identity=32 mined=0.3 \
  answers=0.5 answers_batch=4 w_answers=0.3
training bridge "$bridge-5" "$bridge-4/weights" "$a,$d,$b,$b,$b,$c,$c,$c,$c,$e,$e,$e,$e" "${late[@]}" steps=600 seed=4 \
  w_identity=28 clean=0.3 mined=0 lr=4e-4 w_words=0.8 w_features=1.2
training bridge "$bridge-6" "$bridge-5/weights" "$a,$d,$f,$f,$f,$c,$c,$e,$e,$e" noise_free=0.85 at_one=0.9 warmup=20 \
  steps=500 seed=5 w_identity=32 clean=0.3 mined=0 lr=4e-4 w_words=0.7 w_features=1.4
h="$RUNS/pairs-h"
long=(noise_free=1 at_one=1 clean=0.19 mined=0 w_identity=16 w_direction=0.3 lr=8e-4 warmup=30 save_every=100)
training bridge "$bridge-7" "$bridge-6/weights" "$h,$h,$RUNS/pairs-g" "${long[@]}" steps=2400 seed=21 w_features=3 w_words=0.5
training bridge "$bridge-8" "$bridge-7/weights" "$h,$h,$RUNS/pairs-g" "${long[@]}" steps=1900 seed=22 w_features=4 w_words=0.6
training bridge "$bridge-9" "$bridge-8/weights" "$h,$h,$RUNS/pairs-g" "${long[@]}" steps=4200 seed=23 w_features=5 w_words=0.6 \
  warmup=50 channels=32,64,128,256 jpeg=0.35
i="$RUNS/pairs-i" j="$RUNS/pairs-j"
training bridge "$bridge" "$bridge-9/weights" "$i,$i,$j,$j,$h,$RUNS/pairs-g" "${long[@]}" steps=2000 seed=24 w_features=5 w_words=0.6 \
  lr=6e-4 warmup=50 jpeg=0.35 views=0.4
settings "pairs=$RUNS/pairs-held-out" "photographs=${PHOTOGRAPHS:-}"
stage codefend calibrate "$bridge/weights" "${options[@]}"
echo "done: $bridge/weights"
