#!/usr/bin/env bash
# Search a prompt policy of each kind for the pocket behind BRIDGE, then compare them. generator-pocket is its result;
# soft-pocket and gepa-pocket were searched behind an earlier bridge (see their cards).
source "$(dirname "$0")/common.sh"

# search METHOD KEY=VALUE...: one search; its policy is in prompt-METHOD/policy.
search() {
  settings "victim=$POCKET" "bank.purifier=$BRIDGE" batch=24 bank.selection_scenes=16 \
    bank.held_out=feature-target,apgd-targeted,joint-targeted,words,injection "${@:2}"
  stage codefend optimize-prompt --method "$1" --run "$RUNS/prompt-$1" "${options[@]}"
}

met=feature,word-head,corruption,planted,characters
search soft bank.search_scenes=24 "bank.seen=$met" soft.steps=100
search gepa bank.search_scenes=24 "bank.seen=$met" gepa.evaluations=1500
search generator bank.search_scenes=96 bank.seen=planted,characters bank.attack.queries=12 bank.unpurified=false
settings "victim=$POCKET" "purifiers=none,diffpure:t=0.03,$BRIDGE" scenes=32 batch=32 attack.steps=15 \
  seen=feature,word-head,apgd,planted,characters unseen=stadv,perc-al,patch \
  joint=typographic,joint,joint-targeted,injection,words,glyphs
for method in soft gepa generator; do options+=(--prompt "$RUNS/prompt-$method/policy"); done
stage codefend prompts table --run "$RUNS/prompt-table" --prompt adashield-static "${options[@]}"
echo "done: $RUNS/prompt-table/table.md"
