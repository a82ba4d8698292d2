#!/usr/bin/env bash
# Ablations of the bridge's training: one setting each, at equal training budget, in one table. Needs pairs.sh.
source "$(dirname "$0")/common.sh"
names="full static replay no-features no-words no-direction no-noise one-encoder unseen-features unseen-language scratch"
defenses=none
for name in $names; do
  start="$PRIOR"
  [ "$name" != scratch ] || start=none
  stage codefend train bridge --config "recipes/ablations/$name.toml" --run "$RUNS/ablations/$name" \
    --set "pairs=$RUNS/pairs" --set "victim=$POCKET" --set "prior=$start"
  defenses="$defenses,$RUNS/ablations/$name/weights"
done
for count in 2 4; do
  defenses="$defenses,$RUNS/ablations/full/weights:evaluations=$count"
done
stage codefend eval quick --run "$RUNS/ablations/table" --victim "$POCKET" --set "defenses=$defenses" --set adaptive= \
  --set attacks=apgd,feature --set limit=32 --set adaptive_limit=8
codefend report "$RUNS/ablations/table"
