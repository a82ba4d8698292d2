#!/usr/bin/env bash
# Bridge and peers in one run on the same attacked pictures; then FARE's pocket, and the results into the model cards.
source "$(dirname "$0")/common.sh"
peers="hgd flowpure flowpure-gauss adbm codefend-r"
defenses="none,jpeg,diffpure:t=0.05,steps=5,$RUNS/bridge/weights"
for name in $peers; do
  defenses="$defenses,$RUNS/$name/weights"
done
stage codefend eval standard --run "$RUNS/compare" --victim "$POCKET" --set "defenses=$defenses" --set adaptive= \
  --set eps=2,4,8 --set attacks=apgd,apgd-targeted,feature
stage codefend eval standard --run "$RUNS/compare-fare" --victim "$RUNS/fare/weights" --set defenses=none --set adaptive= \
  --set eps=2,4,8 --set attacks=apgd,apgd-targeted,feature
for name in bridge $peers; do
  codefend card "$RUNS/$name/weights" "$RUNS/compare"
done
codefend card "$RUNS/fare/weights" "$RUNS/compare-fare" --defense none
codefend report "$RUNS/compare"
codefend report "$RUNS/compare-fare"
