"""Tables about attackers: how often they succeed, and whether a defense only stops what it was trained on."""

from __future__ import annotations

from codefend.bench.report import Report
from codefend.bench.report.tables import Table, rate, with_interval
from codefend.bench.results import (
    CLEAN,
    difference,
    eps_label,
    gate,
    grouped,
    interval,
    overall_rows,
    paired,
    strongest,
    success_rates,
)


def success(report: Report) -> Table:
    """Attack success in the worst case over attacks, with its denominator: what ``codefend eval --max-asr`` reads."""
    rates, unseen = success_rates(report.rows), success_rates(report.rows, refused=gate(report.rows))
    judged = set(strongest(rates))
    norm, watched = report.rows[0]["norm"], {r["defense"] for r in report.rows if r.get("suspicion") is not None}
    lines = [
        (
            *(g.task, g.defense, g.threat, eps_label(g.eps, norm) or "own bound", rate(found)),
            *(rate(unseen[g]) if g.defense in watched else "–", "yes" if g in judged else ""),
        )
        for g, found in sorted(rates.items(), key=lambda pair: pair[0]._replace(threat="", attack=""))
    ]
    columns = ("task", "defense", "threat", "eps", "attack success", "past a gate", "strongest")
    notes = (
        "images answered right when nobody attacks, on which any attack of the threat or of a weaker one, in any "
        "submission, made the answer wrong or its target appear. Past a gate: likewise, if the pictures that the "
        "purifier finds more suspicious than 95% of the clean ones were refused; an attack with evade= aims at that. "
        "--max-asr compares the strongest threat of each defense.",
    )
    return Table("Attack success, worst case over attacks", columns, tuple(lines), notes, frozenset(columns[:3]))


def seen_and_unseen(report: Report) -> Table:
    """Worst cases over the attacks that the defenses were trained on and over the others, on the same examples."""
    seen = set(report.config.get("seen") or ())
    groups = {
        g: rows for g, rows in grouped(report.rows).items() if g.attack == CLEAN or rows[0]["access"] != "control"
    }
    parts = [
        overall_rows(groups, among=lambda group, wanted=wanted: (group.attack in seen) is wanted)  # type: ignore[misc]
        for wanted in (True, False)
    ]
    norm, lines = report.rows[0]["norm"], []
    for group in parts[0]:
        if group not in parts[1]:
            continue
        pairs = paired(parts[0][group], parts[1][group])
        old, new = (list(side) for side in zip(*pairs, strict=True)) if pairs else ([], [])
        found = [interval(rows, field="worst_scores") for rows in (old, new)]
        gap = difference(old, new)
        cells = (with_interval(found[0]), with_interval(found[1]), with_interval(gap), str(gap.n))
        lines.append((group.task, group.defense, group.threat, eps_label(group.eps, norm), *cells))
    columns = ("task", "defense", "threat", "eps", "seen", "unseen", "seen - unseen", "n")
    others = sorted({g.attack for g in groups if g.attack not in seen and g.attack != CLEAN})
    notes = (f"worst case over the attacks; seen in training: {', '.join(sorted(seen))}; unseen: {', '.join(others)}.",)
    return Table("Seen and unseen attacks", columns, tuple(lines), notes, frozenset(columns[:3]))
