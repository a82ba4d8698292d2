# Sourced by every recipe. A recipe trains one kind of weights in commands that resume: rerun it until it prints "done".
# From scratch, in this order:
#   recipes/pocket.sh && recipes/prior.sh
#   export POCKET=runs/pocket-2/weights PRIOR=runs/prior/weights BRIDGE=runs/bridge/weights
#   recipes/bridge.sh && recipes/bridge-large.sh   # with all their stages: pairs, bridge-detail, teacher-large, encoders
#   recipes/bridge-plain.sh                        # and the peers: hgd, flowpure, flowpure-gauss, adbm, codefend-r, fare,
#                                                  tecoa
#   recipes/headline.sh && recipes/outside.sh       # the headline table, and attacks by others
#   recipes/compare.sh && recipes/ablations.sh     # tables; and recipes/robust-shares.sh: seeds and data
#   recipes/prompts.sh                             # prompt policies
#   recipes/pocket-photographs.sh                  # the pocket answers about photographs
#   recipes/smolvlm-pocket.sh                      # a second victim
# Without POCKET, PRIOR and BRIDGE the shipped weights are used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v codefend > /dev/null || PATH="$PWD/.venv/bin:$PATH"  # where `make test` puts it
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
RUNS="${RUNS:-runs}" POCKET="${POCKET:-pocket}" PRIOR="${PRIOR:-}" BRIDGE="${BRIDGE:-bridge}" MINUTES="${MINUTES:-75}"

# stage COMMAND...: run it for at most MINUTES; its results until then are on disk.
stage() {
  local code=0
  timeout --foreground --signal=INT "${MINUTES}m" "$@" || code=$?
  if [ "$code" -eq 124 ]; then
    echo "stage not finished after $MINUTES minutes: run this recipe again to resume" >&2
  fi
  [ "$code" -eq 0 ] || exit "$code"
}

# settings KEY=VALUE...: write them as options of a command into the array `options`.
settings() {
  options=()
  for setting in "$@"; do options+=(--set "$setting"); done
}

# bank RUN [KEY=VALUE...]: make a bank of pairs.
bank() {
  settings "victim=$POCKET" "${@:2}"
  stage codefend pairs --run "$RUNS/$1" "${options[@]}"
}

# held_out: make the bank to calibrate detection scores on.
held_out() {
  bank pairs-held-out seed=99 count=640 kinds=features,words,towards,words steps=10
}

# before_robust: run the stages before the last trainings of both bridges, except for those that TEACHER stands for.
before_robust() {
  ZOO="$RUNS/encoder-vit16/weights,$RUNS/encoder-convnet/weights"
  if [ -n "${TEACHER:-}" ]; then
    START=bridge-detail
    held_out
  else
    START="$RUNS/bridge-detail/weights" TEACHER="$RUNS/teacher-large/weights"
    bash recipes/pairs.sh
    bash recipes/bridge-detail.sh
    bash recipes/teacher-large.sh
  fi
  bash recipes/encoders.sh
}

# training PRESET RUN START BANKS KEY=VALUE...: train a bridge from the weights in START.
training() {
  settings "prior=$3" "pairs=$4" "victim=$POCKET" "${@:5}"
  stage codefend train "$1" --run "$2" "${options[@]}"
}
