#!/usr/bin/env bash
# The teacher of both bridges and start of the large one, without noise: one training from bridge-detail's ninth, in a
# network three times as large, on pairs of which many were attacked through another view. For a GPU: on one H200 the fourteen banks took 95 seconds in
# parallel (here they are made one after another) and a step 0.13 seconds; the shipped weights are those of step 2,720.
# Needs bridge-detail.sh; PHOTOGRAPHS as in pairs.sh.
source "$(dirname "$0")/common.sh"

teacher="$RUNS/teacher-large" banks=""
for seed in $(seq 60 73); do
  bank "pairs-views-$seed" seed="$seed" count=1536 kinds=features,features,towards,features,words steps=10 max_eps=12/255 views=0.5 \
    shard=256 "photographs=${PHOTOGRAPHS:-}"
  banks+="$RUNS/pairs-views-$seed,"
done
training bridge "$teacher" "$RUNS/bridge-detail-9/weights" "${banks%,}" noise_free=1 at_one=1 mined=0 w_identity=16 w_direction=0.3 \
  w_features=5 w_words=0.6 steps=3400 seed=31 batch=128 lr=1e-3 warmup=100 clean=0.19 channels=64,128,192,256 blocks=2,2,4,2 jpeg=0.3 \
  views=0.35 strength=1.04
echo "done: $teacher/weights"
