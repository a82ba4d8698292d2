#!/usr/bin/env bash
# Peers and the bridge, trained like them (bridge-plain.sh) and in full (BRIDGE), in one run on the same attacked
# pictures; then FARE's pocket, and the results into the model cards.
source "$(dirname "$0")/common.sh"
trained="bridge-plain hgd flowpure flowpure-gauss adbm codefend-r"
defenses="none,jpeg,diffpure:t=0.05,steps=5,$BRIDGE"
for name in $trained; do
  defenses="$defenses,$RUNS/$name/weights"
done
stage codefend eval standard --run "$RUNS/compare" --victim "$POCKET" --set "defenses=$defenses" --set adaptive= \
  --set eps=2,4,8 --set attacks=apgd,apgd-targeted,feature
# Through the whole defense, gradients averaged over its noise; FARE's pocket has no purifier to see through.
stage codefend eval standard --run "$RUNS/compare-adaptive" --victim "$POCKET" --set "defenses=$defenses" \
  --set "adaptive=${defenses#none,}" --set threats=T2 --set eps=2,4,8 --set attacks=word-head,apgd --set eot=12 \
  --set resubmissions=3 --set limit=32 --set adaptive_limit=32
stage codefend eval standard --run "$RUNS/compare-fare" --victim "$RUNS/fare/weights" --set defenses=none --set adaptive= \
  --set eps=2,4,8 --set attacks=apgd,apgd-targeted,feature,word-head
for name in $trained; do
  codefend card "$RUNS/$name/weights" "$RUNS/compare"
done
[ "$BRIDGE" = bridge ] || codefend card "$BRIDGE" "$RUNS/compare"  # the shipped card has its own figures
codefend card "$RUNS/fare/weights" "$RUNS/compare-fare" --defense none
codefend report "$RUNS/compare"
codefend report "$RUNS/compare-adaptive"
codefend report "$RUNS/compare-fare"
