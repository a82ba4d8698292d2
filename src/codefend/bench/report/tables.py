"""Tables of a report, made once as text and rendered for terminal, Markdown and HTML; and the CSV of raw numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from codefend.bench.report import Report
from codefend.bench.results import (
    BARE,
    CLEAN,
    OVERALL,
    THREATS,
    WORST,
    Entry,
    Group,
    Rate,
    eps_label,
    gaps,
    grouped,
    overall,
    scores,
    worst_rows,
)
from codefend.bench.sanity import Flag
from codefend.core.runs import Row
from codefend.tasks.intervals import Interval
from codefend.tasks.metrics import corpus_bleu4
from codefend.types import CodefendError, Example

if TYPE_CHECKING:
    from rich.table import Table as RichTable

TERMINAL_LINES = 40  # longer result tables show clean and worst-case lines only
RULES = (
    "Ranked by the worst case under the strongest threat in the run: for each example the lowest score over all "
    "attacks of that threat and of every weaker one, at the largest eps or within a bound of their own, as patches and "
    "words have; all resubmissions of a randomized defense counted.",
    "Defenses that were never attacked through themselves are listed without a rank: a score against an attacker who "
    "does not know the defense is no robustness. The bare victim has nothing to look through and is ranked by T0.",
    "Attacked images are rounded to 8 bits and stay inside the budget; scores are over all examples, wrong clean "
    "answers included. Brackets are 95% bootstrap intervals over images; one without width says that all examples "
    "agreed, not that many more would.",
)
RESUBMITTED = (
    "worst of N: mean of each example's lowest score over N submissions of one image to a randomized defense; vote of "
    "N: score of the answer that most of the N gave, the first of equals.",
)
THREAT_WORDS = {
    "clean": "nobody attacks",
    "T0": "oblivious: the attack sees the bare victim",
    "T1": "transfer: the attack goes through a surrogate defense",
    "T2": "white box: the attack goes through the defense itself",
    "T2d": "white box that knows the seed of the defense's noise",
}


@dataclass(frozen=True)
class Table:
    """Text cells under ``columns``; ``notes`` belong below. ``left`` columns are words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: frozenset[str] = frozenset()


# --- numbers to text -------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    """Two digits, a dash where nothing was scored."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def with_interval(found: Interval) -> str:
    """``0.81 [0.70, 0.90]``."""
    return number(found.mean) + ("" if math.isnan(found.low) else f" [{found.low:.2f}, {found.high:.2f}]")


def rate(found: Rate) -> str:
    """``7/12 (58%)``: always with the denominator."""
    return f"{found.hits}/{found.n} ({found.share:.0%})" if found.n else "–"


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"


def flags_of(group: Group, flags: Sequence[Flag]) -> list[Flag]:
    """The doubts about one figure, those about everything left out; a worst case inherits those about its attacks."""
    own = [flag for flag in flags if flag.defense or flag.threat]
    found = [flag for flag in own if flag.covers(_doubted(group, flag))]
    return [flag for flag in found if flag.check != "too few examples" and group.attack != CLEAN]


def _doubted(group: Group, flag: Flag) -> Group:
    """The figure that a doubt would be about, if it is about one that ``group`` stands for."""
    if group.attack == OVERALL and flag.eps == 0:
        return group._replace(attack=flag.attack, eps=0.0)
    return group._replace(attack=flag.attack) if group.attack in (WORST, OVERALL) else group


def checks_of(group: Group, flags: Sequence[Flag]) -> str:
    """The names of ``flags_of``, with commas."""
    return ", ".join(dict.fromkeys(flag.check for flag in flags_of(group, flags)))


# --- the tables ------------------------------------------------------------------------------------------------------


def leaderboard(report: Report, task: str) -> Table:
    """Defenses of one task by their worst case under the strongest threat, over all attacks (``results.overall``)."""
    entries = [entry for entry in report.entries if entry.group.task == task]
    worst = {(e.group.defense, e.group.threat): e for e in overall([row for row in report.rows if row["task"] == task])}
    clean = {e.group.defense: e for e in entries if e.group.attack == CLEAN}
    threats = [threat for threat in THREATS[1:] if any(threat == key[1] for key in worst)]
    judged = {defense: _ranked_by(defense, worst) for defense in clean}
    order = sorted(clean, key=lambda d: (judged[d] is None, -_mean(judged[d]), -_mean(worst.get((d, "T0")))))
    lines, rank = [], 0
    for defense in order:
        final = judged[defense]
        rank += final is not None
        cells = [worst.get((defense, threat)) for threat in threats]
        lines.append(
            (
                str(rank) if final else "–",
                defense,
                with_interval(clean[defense].score),
                *(f"{with_interval(cell.score)} n={cell.score.n}" if cell else "–" for cell in cells),
                percent(final.kept) if final else "–",
                checks_of(final.group, report.flags) if final else "not attacked through itself",
            )
        )
    metric, label = entries[0].metric, _largest_label(entries)
    columns = ("rank", "defense", "clean", *(f"{threat} worst case" for threat in threats), "kept", "doubts")
    title = f"{task}: {metric} at {label}" if label else f"{task}: {metric}"
    left = frozenset({"defense", "doubts"})
    return Table(title, columns, tuple(lines), RULES, left)


def _largest_label(entries: Sequence[Entry]) -> str:
    top = max(entries, key=lambda e: e.group.eps)
    label = eps_label(top.group.eps, top.norm)
    own = any(e.group.eps == 0 and e.group.attack != CLEAN for e in entries)
    return f"{label} or an attack's own bound" if label and own else label


def _mean(entry: Entry | None) -> float:
    return entry.score.mean if entry and not math.isnan(entry.score.mean) else -1.0


def _ranked_by(defense: str, worst: dict[tuple[str, str], Entry]) -> Entry | None:
    """The entry that ranks a defense: its strongest threat from T2 on; the bare victim has nothing to adapt to."""
    threats = ("T2d", "T2", "T0") if defense == BARE else ("T2d", "T2")
    return next((worst[defense, threat] for threat in threats if (defense, threat) in worst), None)


def overview(report: Report) -> Table:
    """One line per defense: mean scores of each task, clean and in the worst case of each threat over all attacks."""
    means: dict[tuple[str, str, str], str] = {}
    clean = [entry for entry in report.entries if entry.group.attack == CLEAN]
    for e in (*clean, *overall(report.rows)):
        means[e.group.defense, e.group.task, e.group.threat] = f"{number(e.score.mean)} n={e.score.n}"
    places = list(dict.fromkeys((task, threat) for _, task, threat in means))
    places.sort(key=lambda place: (report.tasks.index(place[0]), THREATS.index(place[1])))
    defenses = list(dict.fromkeys(defense for defense, _, _ in means))
    lines = [(d, *(means.get((d, *place), "–") for place in places)) for d in defenses]
    words = "; ".join(f"{t}: {THREAT_WORDS[t]}" for t in dict.fromkeys(threat for _, threat in places) if t != "clean")
    title = f"Scores, clean and attacked at {_largest_label(report.entries)}"
    columns = ("defense", *(f"{task} {threat}" for task, threat in places))
    return Table(title, columns, tuple(lines), (words,), frozenset({"defense"}))


def results(report: Report, task: str, *, brief: bool = False) -> Table:
    """Every figure of one task; ``brief`` leaves out single attacks."""
    entries = [entry for entry in report.entries if entry.group.task == task]
    if brief:
        entries = [entry for entry in entries if entry.group.attack in (CLEAN, WORST)]
    entries = sorted(entries, key=_order(report))
    most = max(entry.resubmissions for entry in entries)
    again = (f"worst of {most}", f"vote of {most}") if most > 1 else ()
    columns = ("defense", "threat", "attack", "eps", "score", "n", "kept", *again, "broken", "target", "doubts")
    lines = tuple(_figure(entry, report.flags, resubmitted=most > 1) for entry in entries)
    left = frozenset({"defense", "threat", "attack", "doubts"})
    return Table(f"{task}: all figures", columns, lines, _legend(entries, resubmitted=most > 1), left)


def _figure(entry: Entry, flags: Sequence[Flag], *, resubmitted: bool) -> tuple[str, ...]:
    """A line of ``results``."""
    group = entry.group
    return (
        group.defense,
        group.threat,
        "" if group.attack == CLEAN else group.attack,
        eps_label(group.eps, entry.norm),
        with_interval(entry.score),
        str(entry.score.n),
        percent(entry.kept),
        *(_resubmitted(entry) if resubmitted else ()),
        rate(entry.untargeted),
        rate(entry.targeted),
        checks_of(group, flags),
    )


def _legend(entries: Sequence[Entry], *, resubmitted: bool) -> tuple[str, ...]:
    """What the columns of ``results`` mean."""
    return (
        f"score: {entries[0].metric}, mean with a 95% bootstrap interval over images; n: examples scored.",
        "kept: share of the undefended clean score on the same examples.",
        "broken: right on the clean image became wrong, of those that this same defense answers right; target: the "
        "attacker's sentence appeared, of those where it wasn't there before.",
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
        return (
            THREATS.index(group.threat),
            group.eps,
            group.attack == WORST,
            "" if group.attack == WORST else group.attack,
            defenses.index(group.defense),
        )

    return key


def differences(report: Report) -> Table:
    """How far each defense lies below the best one in the worst case, on the same examples."""
    found = gaps(worst_rows(grouped(report.rows)))
    norm = report.rows[0]["norm"]
    lines = [
        (g.task, g.threat, eps_label(g.eps, norm), g.defense, with_interval(gap), str(gap.n), _verdict(gap))
        for g, gap in found.items()
    ]
    columns = ("task", "threat", "eps", "defense", "below the best by", "n", "clear?")
    notes = ("Paired over the examples that both were judged on; clear: the 95% interval leaves 0 out.",)
    return Table("Paired differences of worst cases", columns, tuple(lines), notes, frozenset(columns[:4]))


def _verdict(gap: Interval) -> str:
    return "yes" if gap.low > 0 else "no"


def doubts(report: Report) -> Table:
    """What the sanity checks found, figures with the same doubt on one line."""
    places: dict[tuple[str, str], list[str]] = {}
    for flag in report.flags:
        places.setdefault((flag.check, flag.reason), []).append(flag.where)
    lines = [(check, _listed(found), reason) for (check, reason), found in places.items()]
    columns = ("check", "where", "reason")
    return Table("Doubts", columns, tuple(lines), (), frozenset(columns))


def _listed(places: Sequence[str], most: int = 4) -> str:
    more = f"; and {len(places) - most} more" if len(places) > most else ""
    return "; ".join(places[:most]) + more


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
    notes = (f"one picture of {', '.join(sorted(sizes))} pixels at a time; millions of multiply-adds in networks.",)
    columns = ("defense", "ms/image", "M multiply-adds", "evaluations", "randomized", "gradient")
    return Table("Cost", columns, tuple(lines), notes, frozenset({"defense", "gradient"}))


def all_metrics(report: Report, task: str) -> Table:
    """The mean of every metric in every figure; BLEU-4 as the corpus figure, which isn't a mean."""
    groups = {group: rows for group, rows in grouped(report.rows).items() if group.task == task}
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows[0]["scores"]))
    norm = report.rows[0]["norm"]
    lines = [
        (
            *(g.defense, g.threat, "" if g.attack == CLEAN else g.attack, eps_label(g.eps, norm)),
            *(number(metric_mean(rows, name), 3) for name in names),
            number(_restored(rows), 1),
        )
        for g, rows in groups.items()
    ]
    columns = ("defense", "threat", "attack", "eps", *names, "PSNR dB")
    notes = ("PSNR: of what the victim saw, against the clean picture; pictures that are identical are left out.",)
    return Table(f"{task}: all metrics", columns, tuple(lines), notes, frozenset(columns[:3]))


def metric_mean(rows: Sequence[Row], name: str) -> float:
    """Mean over the scored examples; corpus BLEU-4 where that is asked and can be had."""
    if name == "bleu4":
        examples = [Example(row["example"], torch.empty(0), row["prompt"], tuple(row["references"])) for row in rows]
        try:
            return corpus_bleu4([row["answer"] for row in rows], examples)
        except CodefendError:  # sacrebleu is missing
            return math.nan
    return scores(rows, metric=name).nanmean().item()


def _restored(rows: Sequence[Row]) -> float:
    found = [row["purified_psnr"] for row in rows if row["purified_psnr"] is not None]
    return sum(found) / len(found) if found else math.nan


# --- renderings ------------------------------------------------------------------------------------------------------


def summary_tables(report: Report) -> list[Table]:
    """For a terminal: leaderboard and results of each task, then the doubts."""
    shown = []
    for task in report.tasks:
        full = results(report, task)
        short = full if len(full.lines) <= TERMINAL_LINES else results(report, task, brief=True)
        shown += [leaderboard(report, task), short]
    return [table for table in [*shown, doubts(report)] if table.lines]


def rich_table(table: Table) -> RichTable:
    """The table for a terminal, its notes below it."""
    from rich.table import Table as RichTable
    from rich.text import Text

    caption = Text("\n".join(table.notes)) if len(table.notes) == 1 else None  # long legends belong into files
    made = RichTable(title=table.title, caption=caption, title_justify="left", caption_justify="left")
    for column in table.columns:
        made.add_column(column, justify="left" if column in table.left else "right", overflow="fold")
    for line in table.lines:
        made.add_row(*(Text(cell) for cell in line))  # Text: answers and labels are no markup
    return made
