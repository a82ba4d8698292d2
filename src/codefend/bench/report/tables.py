"""The tables of a report. Every figure is a view of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from codefend.bench.report.reading import Report
from codefend.bench.report.table import Table, number, percent, rate, with_interval
from codefend.bench.results import (
    BARE,
    CLEAN,
    OVERALL,
    THREATS,
    WORST,
    Entry,
    Group,
    difference,
    eps_label,
    gaps,
    gate,
    group_rows,
    interval,
    overall,
    overall_rows,
    pair_rows,
    scores,
    strongest,
    success_rates,
    worst_rows,
)
from codefend.bench.sanity import Flag
from codefend.bench.tasks import AGREEMENT, BINARY_METRICS
from codefend.core.runs import Row
from codefend.tasks.metrics import corpus_bleu4
from codefend.types import CodefendError, Example

TERMINAL_LINES = 40  # longer result tables show clean and worst-case lines only
RESULTS_WIDTH = 120  # characters; in less, `results` breaks its words
RULES = (
    "Ranked by the worst case under the strongest threat model of the run: for each example the lowest score over all "
    "attacks of that threat and of every weaker one, at the largest eps or within the attack's own bound (patches, "
    "words), over all resubmissions of a randomized defense.",
    "Defenses without an adaptive attack (T2) have no rank: accuracy under oblivious attacks is not robustness. The "
    "undefended victim is ranked by T0, which equals T2 for it.",
    "Attacked images are rounded to 8 bits and stay inside the budget. Scores are means over all examples, including "
    "those with a wrong clean answer. Brackets: 95% bootstrap confidence interval over images; an interval of zero "
    "width says that all examples in the sample agree, not that more would.",
)
RESUBMITTED = (
    "worst of N: mean of each example's lowest score over N submissions of one image to a randomized defense; vote of "
    "N: score of the most frequent of the N answers, the first of equals.",
)
AGREEMENT_NOTE = (
    "agreement: share of the images with the same answer as without attack and defense; agreement_noise: the same "
    "under white noise as large as the change of the image; cosine: restored cosine, of the vision tokens to those of "
    "the clean image.",
)
THREAT_WORDS = {
    "clean": "no attack",
    "T0": "oblivious: the attack goes through the undefended victim",
    "T1": "transfer: the attack goes through a surrogate defense or another victim",
    "T2": "adaptive white-box: the attack goes through the defense itself",
    "T2d": "adaptive white-box with the known seed of the defense's noise",
}


def score_name(metric: str) -> str:
    """``accuracy`` for metrics that say right or wrong, else ``score``."""
    return "accuracy" if metric in BINARY_METRICS else "score"


def flags_of(group: Group, flags: Sequence[Flag]) -> list[Flag]:
    """The warnings about one figure, not those about all figures; a worst case inherits those about its attacks."""
    if group.attack == CLEAN:
        return []
    own = [flag for flag in flags if (flag.defense or flag.threat) and flag.check != "too few examples"]
    return [flag for flag in own if flag.covers(_flagged_group(group, flag))]


def _flagged_group(group: Group, flag: Flag) -> Group:
    """The group of the flag's attack, if ``group`` is a worst case over it."""
    if group.attack == OVERALL and flag.eps == 0:
        return group._replace(attack=flag.attack, eps=0.0)
    return group._replace(attack=flag.attack) if group.attack in (WORST, OVERALL) else group


def checks_of(group: Group, flags: Sequence[Flag]) -> str:
    """The names of `flags_of`, with commas."""
    return ", ".join(dict.fromkeys(flag.check for flag in flags_of(group, flags)))


# --- scores ----------------------------------------------------------------------------------------------------------


def leaderboard(report: Report, task: str) -> Table:
    """Defenses of one task by their worst case under the strongest threat, over all attacks (`results.overall`)."""
    entries = [entry for entry in report.entries if entry.group.task == task]
    worst = {(e.group.defense, e.group.threat): e for e in overall([row for row in report.rows if row["task"] == task])}
    clean = {e.group.defense: e for e in entries if e.group.attack == CLEAN}
    threats = [threat for threat in THREATS[1:] if any(threat == key[1] for key in worst)]
    deciding = {defense: _deciding_entry(defense, worst) for defense in clean}
    order = sorted(clean, key=lambda d: (deciding[d] is None, -_mean(deciding[d]), -_mean(worst.get((d, "T0")))))
    lines, rank = [], 0
    for defense in order:
        final = deciding[defense]
        rank += final is not None
        cells = [worst.get((defense, threat)) for threat in threats]
        lines.append(
            (
                str(rank) if final else "–",
                defense,
                with_interval(clean[defense].score),
                *(f"{with_interval(cell.score)} n={cell.score.n}" if cell else "–" for cell in cells),
                percent(final.retained) if final else "–",
                checks_of(final.group, report.flags) if final else "no adaptive attack",
            )
        )
    metric, label = entries[0].metric, _largest_label(entries)
    name = score_name(metric)
    robust = (f"robust {name} {threat}" for threat in threats)
    columns = ("rank", "defense", f"clean {name}", *robust, "of clean", "warnings")
    title = f"{task}: {metric} at {label}" if label else f"{task}: {metric}"
    return Table(title, columns, tuple(lines), RULES, frozenset({"defense", "warnings"}))


def _largest_label(entries: Sequence[Entry]) -> str:
    top = max(entries, key=lambda e: e.group.eps)
    label = eps_label(top.group.eps, top.norm)
    own = any(e.group.eps == 0 and e.group.attack != CLEAN for e in entries)
    return f"{label} or an attack's own bound" if label and own else label


def _mean(entry: Entry | None) -> float:
    return entry.score.mean if entry and not math.isnan(entry.score.mean) else -1.0


def _deciding_entry(defense: str, worst: dict[tuple[str, str], Entry]) -> Entry | None:
    """The entry that ranks a defense: its strongest threat from T2 on; the undefended victim has T0 alone."""
    threats = ("T2d", "T2", "T0") if defense == BARE else ("T2d", "T2")
    return next((worst[defense, threat] for threat in threats if (defense, threat) in worst), None)


def overview(report: Report) -> Table:
    """One line per defense: mean scores of all tasks, clean and in the worst case of each threat over all attacks."""
    means: dict[tuple[str, str, str], str] = {}
    clean = [entry for entry in report.entries if entry.group.attack == CLEAN]
    for e in (*clean, *overall(report.rows)):
        means[e.group.defense, e.group.task, e.group.threat] = f"{number(e.score.mean)} n={e.score.n}"
    figures = list(dict.fromkeys((task, threat) for _, task, threat in means))
    figures.sort(key=lambda figure: (report.tasks.index(figure[0]), THREATS.index(figure[1])))
    defenses = list(dict.fromkeys(defense for defense, _, _ in means))
    lines = [(d, *(means.get((d, *figure), "–") for figure in figures)) for d in defenses]
    threats = dict.fromkeys(threat for _, threat in figures if threat != "clean")
    note = "; ".join(f"{threat}: {THREAT_WORDS[threat]}" for threat in threats)
    title = f"Clean and robust scores, attacks at {_largest_label(report.entries)}"
    columns = ("defense", *(f"{task} {threat}" for task, threat in figures))
    return Table(title, columns, tuple(lines), (note,), frozenset({"defense"}))


def results(report: Report, task: str, *, brief: bool = False) -> Table:
    """Every figure of one task; ``brief`` leaves out single attacks."""
    entries = [entry for entry in report.entries if entry.group.task == task]
    if brief:
        entries = [entry for entry in entries if entry.group.attack in (CLEAN, WORST)]
    entries = sorted(entries, key=_order(report))
    most = max(entry.resubmissions for entry in entries)
    again = (f"worst of {most}", f"vote of {most}") if most > 1 else ()
    score = f"{score_name(entries[0].metric)} [95% CI]"
    rates = ("attack success", "target forced")
    columns = ("defense", "threat", "attack", "eps", score, "n", "of clean", *again, *rates, "warnings")
    lines = tuple(_figure(entry, report.flags, resubmitted=most > 1) for entry in entries)
    left = frozenset({"defense", "threat", "attack", "warnings"})
    return Table(f"{task}: all figures", columns, lines, _legend(entries, resubmitted=most > 1), left)


def _figure(entry: Entry, flags: Sequence[Flag], *, resubmitted: bool) -> tuple[str, ...]:
    """A line of `results`."""
    group = entry.group
    return (
        group.defense,
        group.threat,
        "" if group.attack == CLEAN else group.attack,
        eps_label(group.eps, entry.norm),
        with_interval(entry.score),
        str(entry.score.n),
        percent(entry.retained),
        *(_resubmitted(entry) if resubmitted else ()),
        rate(entry.untargeted),
        rate(entry.targeted),
        checks_of(group, flags),
    )


def _legend(entries: Sequence[Entry], *, resubmitted: bool) -> tuple[str, ...]:
    """What the columns of `results` mean."""
    metric = entries[0].metric
    return (
        f"{score_name(metric)}: mean of {metric}, with a 95% bootstrap confidence interval over images; n: examples.",
        "of clean: share of the undefended clean score on the same examples.",
        "attack success: share of the examples answered correctly by the same defense without attack, whose answer the "
        "attack made wrong; target forced: share of the examples in whose answer it forced the attacker's sentence.",
        *(RESUBMITTED if resubmitted else ()),
        *(f"{threat}: {THREAT_WORDS[threat]}." for threat in THREATS if any(e.group.threat == threat for e in entries)),
    )


def _resubmitted(entry: Entry) -> tuple[str, str]:
    """Worst case and majority vote over N submissions, with the examples they are means of."""
    if entry.resubmissions == 1:
        return "–", "–"
    vote = "–" if entry.group.attack == WORST else f"{number(entry.vote)} n={entry.score.n}"  # rows of several attacks
    return f"{number(entry.worst)} n={entry.score.n}", vote


def _order(report: Report) -> Callable[[Entry], tuple[Any, ...]]:
    defenses = list(dict.fromkeys(entry.group.defense for entry in report.entries))

    def key(entry: Entry) -> tuple[Any, ...]:
        group = entry.group
        worst = group.attack == WORST
        attack = "" if worst else group.attack
        return THREATS.index(group.threat), group.eps, worst, attack, defenses.index(group.defense)

    return key


def all_metrics(report: Report, task: str) -> Table:
    """The mean of every metric in every figure; BLEU-4 over the corpus, which isn't a mean."""
    groups = {group: rows for group, rows in group_rows(report.rows).items() if group.task == task}
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows[0]["scores"]))
    thresholds = {cost["defense"]: cost.get("threshold") for cost in report.bench.get("costs", [])}
    lines = [
        (
            *(g.defense, g.threat, "" if g.attack == CLEAN else g.attack, eps_label(g.eps, report.norm)),
            *(number(metric_mean(rows, name), 3) for name in names),
            *(_psnr(rows), _flagged(rows, thresholds.get(g.defense))),
        )
        for g, rows in groups.items()
    ]
    columns = ("defense", "threat", "attack", "eps", *names, "PSNR dB", "flagged")
    notes = (
        "PSNR: of the victim's input against the clean image, mean over images that differ; the share of identical "
        "images is in brackets.",
        "flagged: share of images above the threshold of the purifier's detector.",
        *(AGREEMENT_NOTE if AGREEMENT in names else ()),
    )
    return Table(f"{task}: all metrics", columns, tuple(lines), notes, frozenset(columns[:3]))


def metric_mean(rows: Sequence[Row], name: str) -> float:
    """Mean over the scored examples; corpus BLEU-4 where sacrebleu is installed."""
    if name == "bleu4":
        examples = [Example(row["example"], torch.empty(0), row["prompt"], tuple(row["references"])) for row in rows]
        try:
            return corpus_bleu4([row["answer"] for row in rows], examples)
        except CodefendError:  # sacrebleu is missing
            return math.nan
    return scores(rows, metric=name).nanmean().item()


def _psnr(rows: Sequence[Row]) -> str:
    values = [row["purified_psnr"] for row in rows if row["purified_psnr"] is not None]
    if not values or len(values) == len(rows):
        return number(sum(values) / len(values) if values else None, 1)
    return f"{sum(values) / len(values):.1f} ({1 - len(values) / len(rows):.0%})"


def _flagged(rows: Sequence[Row], threshold: float | None) -> str:
    values = [row.get("suspicion") for row in rows]
    if threshold is None or None in values:
        return "–"
    return f"{sum(value > threshold for value in values if value is not None) / len(values):.0%}"


# --- attacks ---------------------------------------------------------------------------------------------------------


def success(report: Report) -> Table:
    """Attack success rates in the worst case over attacks, which ``codefend eval --max-asr`` reads."""
    rates, gated = success_rates(report.rows), success_rates(report.rows, refused=gate(report.rows))
    deciding = set(strongest(rates))
    scored = {row["defense"] for row in report.rows if row.get("suspicion") is not None}
    lines = [
        (
            *(g.task, g.defense, g.threat, eps_label(g.eps, report.norm) or "own bound", rate(value)),
            *(rate(gated[g]) if g.defense in scored else "–", "yes" if g in deciding else ""),
        )
        for g, value in sorted(rates.items(), key=lambda pair: pair[0]._replace(threat="", attack=""))
    ]
    columns = ("task", "defense", "threat", "eps", "attack success rate", "with a gate", "strongest threat")
    notes = (
        "Share of the images answered correctly without attack, on which any attack of the threat or a weaker one, in "
        "any submission, made the answer wrong or its target appear. With a gate: the same if the images with a "
        "detection score above that of 95% of the clean ones were refused; attacks with evade= aim at that. --max-asr "
        "reads the strongest threat of each defense.",
    )
    return Table("Attack success rate, worst case over attacks", columns, tuple(lines), notes, frozenset(columns[:3]))


def seen_and_unseen(report: Report) -> Table:
    """Worst cases over the attacks that the defenses were trained on and over the others, on the same examples."""
    seen = set(report.config.get("seen") or ())
    groups = {
        group: rows
        for group, rows in group_rows(report.rows).items()
        if group.attack == CLEAN or rows[0]["access"] != "control"
    }
    trained = overall_rows(groups, among=lambda group: group.attack in seen)
    others = overall_rows(groups, among=lambda group: group.attack not in seen)
    lines = []
    for group in (group for group in trained if group in others):
        pairs = pair_rows(trained[group], others[group])
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
        figures = (
            interval(first, field="worst_scores"),
            interval(second, field="worst_scores"),
            gap := difference(first, second),
        )
        figure = (group.task, group.defense, group.threat, eps_label(group.eps, report.norm))
        lines.append((*figure, *map(with_interval, figures), str(gap.n)))
    columns = ("task", "defense", "threat", "eps", "seen in training", "unseen", "seen - unseen", "n")
    names = sorted({g.attack for g in groups if g.attack not in seen and g.attack != CLEAN})
    notes = (f"Worst case over the attacks. Seen in training: {', '.join(sorted(seen))}; unseen: {', '.join(names)}.",)
    return Table("Attacks seen and unseen in training", columns, tuple(lines), notes, frozenset(columns[:3]))


def attack_table(report: Report) -> Table:
    """The attacks of the run and their sources."""
    keys = ("summary", "goal", "threat", "steps", "source")
    attacks = report.bench.get("attacks", {})
    lines = [(label, *(str(attack.get(key, "")) for key in keys)) for label, attack in attacks.items()]
    columns = ("attack", "what it does", "goal", "access", "steps", "source")
    return Table("Attacks", columns, tuple(lines), (), frozenset(columns) - {"steps"})


# --- comparisons, warnings and costs ---------------------------------------------------------------------------------


def differences(report: Report) -> Table:
    """Paired differences between the best defense and each other one in the worst case, on the same examples."""
    found, comparisons = gaps(worst_rows(group_rows(report.rows)))
    lines = [
        (
            *(g.task, g.threat, eps_label(g.eps, report.norm), g.defense),
            *(with_interval(gap), str(gap.n), "yes" if gap.low > 0 else "no"),
        )
        for g, gap in found.items()
    ]
    columns = ("task", "threat", "eps", "defense", "best minus this", "n", "significant")
    notes = (
        f"Paired over the examples of both. {comparisons} pairs of defenses: the intervals hold together with 95% "
        "(Bonferroni); significant: the interval excludes 0.",
    )
    return Table("Paired differences of worst cases", columns, tuple(lines), notes, frozenset(columns[:4]))


def warnings(report: Report) -> Table:
    """What the sanity checks report; figures with the same warning share a line."""
    figures: dict[tuple[str, str], list[str]] = {}
    for flag in report.flags:
        figures.setdefault((flag.check, flag.reason), []).append(flag.where)
    lines = [(check, _first_of(labels), reason) for (check, reason), labels in figures.items()]
    columns = ("check", "figure", "reason")
    return Table("Warnings", columns, tuple(lines), (), frozenset(columns))


def _first_of(labels: Sequence[str], most: int = 4) -> str:
    more = f"; and {len(labels) - most} more" if len(labels) > most else ""
    return "; ".join(labels[:most]) + more


def costs(report: Report) -> Table:
    """What each defense costs per image, on the machine that ran the evaluation."""
    lines = []
    for cost in report.bench.get("costs", []):
        evaluations, adds = cost.get("evaluations"), cost.get("multiply_adds") or 0
        lines.append(
            (
                str(cost["defense"]),
                f"{cost['ms_per_image']:.1f}",
                f"{adds / 1e6:,.1f}",
                "–" if evaluations is None else str(evaluations),
                "yes" if cost.get("randomized") else "no",
                str(cost.get("gradient", "")),
            )
        )
    sizes = {"x".join(map(str, cost["size"])) for cost in report.bench.get("costs", [])}
    notes = (f"One image of {', '.join(sorted(sizes))} pixels at a time; millions of multiply-adds in networks.",)
    columns = ("defense", "ms/image", "M multiply-adds", "evaluations", "randomized", "gradient")
    return Table("Cost", columns, tuple(lines), notes, frozenset({"defense", "gradient"}))


def summary_tables(report: Report, width: int) -> list[Table]:
    """For a terminal of ``width`` characters: leaderboard and, where they fit, results of each task, then warnings."""
    tables = [overview(report)] if len(report.tasks) > 1 else []
    for task in report.tasks:
        full = results(report, task)
        short = full if len(full.lines) <= TERMINAL_LINES else results(report, task, brief=True)
        tables += [leaderboard(report, task), short] if width >= RESULTS_WIDTH else [leaderboard(report, task)]
    return [table for table in [*tables, warnings(report)] if table.lines]
