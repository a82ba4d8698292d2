#!/usr/bin/env bash
# Compare the peers with the bridge, at equal training budget (bridge-plain.sh) and in full (BRIDGE), on the same
# adversarial images; then FARE's pocket. Results are added to the model cards.
source "$(dirname "$0")/common.sh"
trained="bridge-plain hgd flowpure flowpure-gauss adbm codefend-r"
defenses="none,jpeg,diffpure:t=0.05,steps=5,$BRIDGE"
for name in $trained; do
  defenses="$defenses,$RUNS/$name/weights"
done
stage codefend eval standard --run "$RUNS/compare" --victim "$POCKET" --set "defenses=$defenses" --set adaptive= \
  --set eps=2,4,8 --set attacks=apgd,apgd-targeted,feature
# Adaptive white-box attacks, with gradients averaged over the noise; FARE's pocket has no purifier to attack through.
stage codefend eval standard --run "$RUNS/compare-adaptive" --victim "$POCKET" --set "defenses=$defenses" \
  --set "adaptive=${defenses#none,}" --set threats=T2 --set eps=2,4,8 --set attacks=word-head,apgd --set eot=12 \
  --set resubmissions=3 --set limit=32 --set adaptive_limit=32
stage codefend eval standard --run "$RUNS/compare-fare" --victim "$RUNS/fare/weights" --set defenses=none --set adaptive= \
  --set eps=2,4,8 --set attacks=apgd,apgd-targeted,feature,word-head
for name in $trained; do
  codefend card "$RUNS/$name/weights" "$RUNS/compare"
done
[ "$BRIDGE" = bridge ] || codefend card "$BRIDGE" "$RUNS/compare"  # the shipped card has its own results
codefend card "$RUNS/fare/weights" "$RUNS/compare-fare" --defense none
codefend report "$RUNS/compare"
codefend report "$RUNS/compare-adaptive"
codefend report "$RUNS/compare-fare"
