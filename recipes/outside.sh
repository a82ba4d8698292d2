#!/usr/bin/env bash
# Attacks of other libraries beside ours, at equal steps, on the undefended pocket and through the bridges: needs the extra
# `outside`; with torchattacks installed (pip install --no-deps torchattacks), TORCHATTACKS=1 adds its attacks.
source "$(dirname "$0")/common.sh"
attacks="pgd,mifgsm,apgd,apgd-margin,pgd-decay,robustvlm,foolbox-pgd,foolbox-adam-pgd,foolbox-mifgsm,art-pgd,art-apgd,art-autoattack"
[ -z "${TORCHATTACKS:-}" ] || attacks="$attacks,torchattacks-pgd,torchattacks-eotpgd,torchattacks-apgd"
stage codefend eval outside --run "$RUNS/outside" --victim "$POCKET" --set "attacks=$attacks"
codefend report "$RUNS/outside"
echo "done: $RUNS/outside"
