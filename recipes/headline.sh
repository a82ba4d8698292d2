#!/usr/bin/env bash
# The headline table: the bridge against all peers, three seeds, 128 images oblivious and 64 adaptive. Peers need their
# recipes first (bridge-plain, hgd, flowpure, flowpure-gauss, adbm, codefend-r, fare, tecoa); oidn needs the extra `oidn`.
# One defense after the other, each in a run that resumes, so that every chunk fits a night on two cores.
source "$(dirname "$0")/common.sh"
peers="jpeg diffpure:t=0.05,steps=5 oidn $BRIDGE:sigma=0.02 $BRIDGE:sigma=0.1"
for name in hgd flowpure flowpure-gauss adbm codefend-r; do
  peers="$peers $RUNS/$name/weights"
done
number=0
for peer in $peers; do
  number=$((number + 1))
  stage codefend eval headline --run "$RUNS/headline-$number" --victim "$POCKET" --set "defenses=none,$BRIDGE,$peer" \
    --set "adaptive=$BRIDGE,$peer" --set "reference=$BRIDGE"
  codefend report "$RUNS/headline-$number"
done
# Robust encoders: without a purifier, and with the bridge in front of them. Their victims need no adaptive row for "none".
for name in fare tecoa; do
  stage codefend eval headline --run "$RUNS/headline-$name" --victim "$RUNS/$name/weights" \
    --set "defenses=none,$BRIDGE,$BRIDGE:sigma=0.1" --set "adaptive=$BRIDGE,$BRIDGE:sigma=0.1" --set "reference=$BRIDGE"
  codefend report "$RUNS/headline-$name"
done
stage codefend certify --run "$RUNS/certify" --victim "$POCKET"
codefend report "$RUNS/certify"
echo "done: $RUNS/headline-*, $RUNS/certify"
