#!/usr/bin/env bash
# The bridge without noise in a network five times as large, by its model card: two trainings from bridge-detail's weights,
# on pairs of which many were attacked through another view. Both banks and the first training want a GPU: on one H200
# fourteen banks side by side took 95 seconds, a step .13; the second training took an hour of two cores. Needs pairs.sh
# (for the held-out bank) and bridge-detail.sh; PHOTOGRAPHS as in pairs.sh.
source "$(dirname "$0")/common.sh"

bridge="$RUNS/bridge-large" banks=""
for seed in $(seq 60 73); do
  bank "pairs-views-$seed" seed="$seed" count=1536 kinds=features,features,towards,features,words steps=10 max_eps=12/255 views=0.5 \
    shard=256 "photographs=${PHOTOGRAPHS:-}"
  banks+="$RUNS/pairs-views-$seed,"
done
late=(noise_free=1 at_one=1 mined=0 w_identity=16 w_direction=0.3 w_features=5)
training bridge "$bridge-1" "$RUNS/bridge-detail/weights" "${banks%,}" "${late[@]}" steps=3400 seed=31 batch=128 lr=1e-3 warmup=100 \
  clean=0.19 w_words=0.6 channels=64,128,192,256 blocks=2,2,4,2 jpeg=0.3 views=0.35
for seed in 80 81; do
  bank "pairs-views-$seed" seed="$seed" count=1536 kinds=features,features,towards steps=10 max_eps=12/255 views=0.4 \
    shares=0.15,0.7,0.15 "photographs=${PHOTOGRAPHS:-}"
done
training bridge "$bridge" "$bridge-1/weights" "$RUNS/pairs-views-80,$RUNS/pairs-views-81" "${late[@]}" steps=900 seed=33 batch=32 \
  lr=8e-5 warmup=20 clean=0.12 w_bridge=4 w_words=0.4 jpeg=0.2 views=0.4
settings "pairs=$RUNS/pairs-held-out" "photographs=${PHOTOGRAPHS:-}"
stage codefend calibrate "$bridge/weights" "${options[@]}"
echo "done: $bridge/weights"
