#!/usr/bin/env bash
# The banks of pairs: one for the peers and the first training of bridge-detail, A to J (see its model card) for the
# other trainings, and one held out to calibrate detection scores on.
source "$(dirname "$0")/common.sh"

# The shipped bridge-detail had another first bank (1,600 pairs), and its banks B and C were made on an earlier pocket.
bank pairs
bank pairs-a seed=11 count=2048 kinds=features,towards,words,words steps=10
bank pairs-b seed=12 count=160 kinds=answers answer_shards=100 answer_steps=10 max_eps=12/255
bank pairs-c seed=13 count=128 kinds=answers answer_shards=100 answer_steps=20 max_eps=0.04
bank pairs-d seed=21 count=1536 kinds=words,words,features steps=10 max_eps=12/255
bank pairs-e seed=22 count=192 kinds=answers answer_shards=100 answer_steps=8 max_eps=10/255
# PHOTOGRAPHS: a folder of your own; the shipped weights used ten of Debian's lomiri-wallpapers-16.04 (model card).
bank pairs-f seed=31 count=1536 kinds=features,features,towards steps=10 max_eps=12/255 "photographs=${PHOTOGRAPHS:-}"
bank pairs-g seed=41 count=1024 kinds=features,towards,words,words steps=10 max_eps=12/255
bank pairs-h seed=51 count=4096 kinds=features,features,towards steps=10 max_eps=12/255 "photographs=${PHOTOGRAPHS:-}"
sized=(count=1536 kinds=features,features,towards steps=10 max_eps=12/255 views=0.4 shares=0.15,0.7,0.15)
bank pairs-i seed=80 "${sized[@]}" "photographs=${PHOTOGRAPHS:-}"
bank pairs-j seed=81 "${sized[@]}" "photographs=${PHOTOGRAPHS:-}"
held_out
echo "done: $RUNS/pairs, $RUNS/pairs-a to $RUNS/pairs-j, $RUNS/pairs-held-out"
