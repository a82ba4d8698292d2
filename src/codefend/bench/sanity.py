"""The evaluation distrusts itself: signs, in the rows alone, that a number means less than it seems.

Every check is a pure function from grouped rows to flags. After Carlini et al. 2019 (arXiv 1902.06705), Athalye et al.
2018 (arXiv 1802.00420, section 3.1) and AutoAttack's checks. A flag is a reason to look, not a verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from codefend.bench.results import BARE, CLEAN, Group, eps_label, grouped, paired, score
from codefend.core.runs import Row

Groups = dict[Group, list[Row]]

ZERO_SHARE = 0.1  # of the gradient steps exactly zero
VANISHING = 1e-9  # median l2 norm of the gradient of a loss in nats
EXPLODING = 1e5  # largest over median norm
ABSURD = 1e8  # median l2 norm of the same gradient
MEANINGFUL = 0.02  # differences of score below this share of the clean score are not worth a flag
STANDARD_ERRORS = 2.0  # a paired difference counts from here on
UNCONVERGED = 0.25  # share of examples whose loss still fell at the end
STILL_STANDING = 0.1  # share of the clean score below which nobody asks whether the attack could do better
CHASED = 0.1  # share of an attack's gain that is one draw of the noise; at 0.13 a score of .15 passed for .25
UNBOUNDED = 0.5  # l-inf radius that lets every pixel be grey
ENOUGH = 100  # examples; with 100 the 95% interval of a share is about +-10 points


@dataclass(frozen=True)
class Flag:
    """One doubt: which check, what it saw, and about which figure (empty and None: about all)."""

    check: str
    reason: str
    task: str
    defense: str = ""
    threat: str = ""
    attack: str = ""
    eps: float | None = None  # 0 for an attack with a bound of its own
    norm: str = "linf"

    @property
    def where(self) -> str:
        """The figure in words."""
        parts = (self.task, self.defense, self.threat, self.attack, eps_label(self.eps or 0.0, self.norm))
        return " · ".join(part for part in parts if part)

    def covers(self, group: Group) -> bool:
        """Whether the doubt is about this figure."""
        mine = (self.task, self.defense, self.threat, self.attack, self.eps)
        return all(a in ("", None) or a == b for a, b in zip(mine, group, strict=True))


def check(rows: Iterable[Row]) -> list[Flag]:
    """Every flag that any check raises, in the order of ``CHECKS``."""
    groups = grouped(rows)
    return [flag for run in CHECKS.values() for flag in run(groups)]


# --- one group at a time ---------------------------------------------------------------------------------------------


def budget_violated(groups: Groups) -> list[Flag]:
    """The attack left its ball or the pixel range; the figure isn't one of this threat model."""
    flags = []
    for group, rows in _crafted(groups):
        bad = [row["violation"] for row in rows if row.get("violation")]
        if bad:
            flags.append(_craft_flag("budget violated", f"{len(bad)} of {len(rows)}: {bad[0]}", group, rows))
    return flags


def gradient_zero(groups: Groups) -> list[Flag]:
    """Gradients that are zero or vanish: the attack saw nothing, which isn't robustness."""
    flags = []
    for group, rows in _crafted(groups):
        found = [row["gradient"] for row in rows if row.get("gradient") and not _won(row)]
        if not found:
            continue
        zero = statistics.fmean(g["zero_share"] for g in found)
        median = statistics.median(g["median"] for g in found)
        if zero > ZERO_SHARE:
            flags.append(_craft_flag("zero gradient", f"{zero:.0%} of the gradients are exactly zero", group, rows))
        elif median < VANISHING:
            reason = f"the gradient vanishes: median norm {median:.1e}"
            flags.append(_craft_flag("zero gradient", reason, group, rows))
    return flags


def gradient_exploding(groups: Groups) -> list[Flag]:
    """Gradients that aren't finite, jump by orders of magnitude or are huge: directions without meaning."""
    flags = []
    for group, rows in _crafted(groups):
        found = [row["gradient"] for row in rows if row.get("gradient") and not _won(row)]
        lost = sum(1 for g in found if g["nonfinite"] or g["max"] is None)
        wild = [g["max"] / g["median"] for g in found if g["max"] is not None and g["median"]]
        if lost:
            reason = f"gradients of {lost} of {len(found)} examples are not finite"
            flags.append(_craft_flag("exploding gradient", reason, group, rows))
        elif wild and statistics.median(wild) > EXPLODING:
            reason = f"the largest gradient is {statistics.median(wild):.0e} times the median one"
            flags.append(_craft_flag("exploding gradient", reason, group, rows))
        elif found and (median := statistics.median(g["median"] for g in found)) > ABSURD:
            reason = f"the gradient is huge: median norm {median:.0e}"
            flags.append(_craft_flag("exploding gradient", reason, group, rows))
    return flags


def random_without_eot(groups: Groups) -> list[Flag]:
    """A randomized defense attacked along single gradient samples looks stronger than it is."""
    flags = []
    for group, rows in _through_noise(groups):
        if all(row["budget"]["eot"] == 1 for row in rows if row.get("budget")):
            reason = "the defense is randomized and the attack averaged one sample per step: raise eot"
            flags.append(_flag("random without EOT", reason, group, rows))
    return flags


def noise_chased(groups: Groups) -> list[Flag]:
    """What the attack gained is in part the noise that it happened to see: under fresh noise it is not there."""
    flags = []
    for group, rows in _through_noise(groups):
        found = [row for row in rows if row.get("curve") and row["objective"].get("source") is not None]
        gain = math.fsum(row["curve"]["start"] - row["curve"]["end"] for row in found)
        kept = math.fsum(row["curve"]["start"] - row["objective"]["source"] for row in found)
        standing = _mean(rows) > STILL_STANDING * _clean_mean(groups, group)
        if standing and gain > 0 and kept < (1 - CHASED) * gain:
            eot = found[0]["budget"]["eot"]
            reason = f"{1 - kept / gain:.0%} of the gain is gone under fresh noise: raise eot above {eot}"
            flags.append(_flag("noise chased", reason, group, rows))
    return flags


def judged_once(groups: Groups) -> list[Flag]:
    """A randomized defense has to survive every submission of an image, not one."""
    doubted: dict[tuple[str, str], Flag] = {}
    for group, rows in _attacked(groups):
        if rows[0]["randomized"] and group.threat != "T2d" and max(row["resubmissions"] for row in rows) == 1:
            reason = "the defense is randomized and each image was submitted once: raise resubmissions"
            doubted.setdefault((group.task, group.defense), Flag("judged once", reason, group.task, group.defense))
    return list(doubted.values())


def not_converged(groups: Groups) -> list[Flag]:
    """The loss was still falling when the steps ran out, and score is left to lose."""
    flags = []
    for group, rows in _crafted(groups):
        found = [row["curve"] for row in rows if row.get("curve")]
        open_ = [c for c in found if not c["converged"]]
        if rows[0]["access"] == "control" or not found or len(open_) <= UNCONVERGED * len(found):
            continue
        if _mean(rows) > STILL_STANDING * _clean_mean(groups, group):
            reason = f"the loss still fell at the end on {len(open_)} of {len(found)} examples: more steps may break it"
            flags.append(_craft_flag("not converged", reason, group, rows))
    return flags


def unbounded_survived(groups: Groups) -> list[Flag]:
    """With every pixel free no defense can stand; one that does hides from the attack."""
    flags = []
    for group, rows in _attacked(groups):
        mean, clean = _mean(rows), _clean_mean(groups, group)
        free = rows[0]["norm"] == "linf" and group.eps >= UNBOUNDED
        if free and _untargeted(rows) and rows[0]["access"] != "control" and mean > STILL_STANDING * clean:
            flags.append(_flag("unbounded survived", f"score {mean:.2f} with every pixel free", group, rows))
    return flags


# --- groups against one another --------------------------------------------------------------------------------------


def adaptive_weaker(groups: Groups) -> list[Flag]:
    """An attack that knows more does less: its gradient is lying, or it is too short."""
    flags = []
    for group, rows in _attacked(groups):
        for weaker in ("T0", "T1"):
            other = groups.get(group._replace(threat=weaker), [])
            if group.threat not in ("T2", "T2d") or not _untargeted(rows) or not other:
                continue
            worse = _gap(paired(rows, other), _clean_mean(groups, group))
            reason = f"the score is {worse:.2f} higher than under {weaker} on the same images" if worse else ""
            if not worse and rows[0]["access"] == "white-box" and (share := _objective_gap(paired(rows, other))):
                reason = f"on {share:.0%} of the images {weaker} lowers the attack's own objective further"
            if reason:
                flags.append(_flag("adaptive weaker", reason, group, rows))
    return flags


def budget_helps_defender(groups: Groups) -> list[Flag]:
    """A larger eps, or more steps of the same attack, gives the attacker strictly more."""
    flags = []
    for group, rows in _attacked(groups):
        if not _untargeted(rows):
            continue
        for other, smaller in _attacked(groups):
            if not _has_less(other, smaller, group, rows):
                continue
            gap = _gap(paired(rows, smaller), _clean_mean(groups, group))
            if gap:
                less = f"{other.attack} {eps_label(other.eps, rows[0]['norm'])}"
                reason = f"the score is {gap:.2f} higher than under the smaller budget of {less}"
                flags.append(_flag("larger budget helps the defender", reason, group, rows))
    return flags


def black_box_wins(groups: Groups) -> list[Flag]:
    """Scores alone beat gradients: the gradients are masked."""
    flags = []
    for group, rows in _attacked(groups):
        if rows[0]["access"] != "score" or not _untargeted(rows):
            continue
        rivals = [found for _, found in _peers(groups, group, "white-box")]
        if not rivals:
            continue
        strongest = min(rivals, key=_mean)
        gap = _gap(paired(strongest, rows), _clean_mean(groups, group))
        if gap:
            reason = f"the score is {gap:.2f} lower than under {strongest[0]['attack']}, which has the gradient"
            flags.append(_flag("black box beats white box", reason, group, rows))
    return flags


def noise_as_strong(groups: Groups) -> list[Flag]:
    """Random noise of the same size does as much as the attack, where the attack aims at what is judged."""
    flags = []
    for group, rows in _attacked(groups):
        aimed = group.threat in ("T2", "T2d") or group.defense == BARE
        if not aimed or rows[0]["access"] == "control" or not _untargeted(rows):
            continue
        for other, noise in _peers(groups, group, "control"):
            pairs, clean = paired(noise, rows), _clean_mean(groups, group)
            if pairs and statistics.fmean(_differences(pairs)) <= MEANINGFUL * clean and clean > 0:
                reason = f"{other.attack} of the same size lowers the score as much"
                flags.append(_flag("noise as strong", reason, group, rows))
    return flags


def too_few(groups: Groups) -> list[Flag]:
    """Too few examples for two digits."""
    counts: dict[tuple[str, str], int] = {}
    for group, rows in groups.items():
        adaptive = group.threat if group.threat in ("T2", "T2d") else ""
        key = (group.task, adaptive)
        counts[key] = min(counts.get(key, len(rows)), len(rows))
    reason = "{} examples: the 95% interval of a share is up to +-{:.0f} points"
    return [
        Flag("too few examples", reason.format(n, 98 / math.sqrt(max(n, 1))), task, threat=threat)
        for (task, threat), n in counts.items()
        if n < ENOUGH and (not threat or n < counts.get((task, ""), n + 1))
    ]


CHECKS: dict[str, Callable[[Groups], list[Flag]]] = {
    "budget violated": budget_violated,
    "zero gradient": gradient_zero,
    "exploding gradient": gradient_exploding,
    "random without EOT": random_without_eot,
    "noise chased": noise_chased,
    "judged once": judged_once,
    "adaptive weaker": adaptive_weaker,
    "larger budget helps the defender": budget_helps_defender,
    "black box beats white box": black_box_wins,
    "noise as strong": noise_as_strong,
    "unbounded survived": unbounded_survived,
    "not converged": not_converged,
    "too few examples": too_few,
}


# --- helpers ---------------------------------------------------------------------------------------------------------


def _attacked(groups: Groups, threat: str | None = None) -> Iterator[tuple[Group, list[Row]]]:
    for group, rows in groups.items():
        if group.attack != CLEAN and threat in (None, group.threat):
            yield group, rows


def _through_noise(groups: Groups) -> Iterator[tuple[Group, list[Row]]]:
    """The groups whose attack followed gradients through a randomized defense."""
    for group, rows in _attacked(groups, "T2"):
        if rows[0]["randomized"] and rows[0]["access"] == "white-box":
            yield group, rows


def _made_for(group: Group) -> Group:
    """At T0 and T1 all defenses are judged on the same images."""
    return group if group.threat in ("T2", "T2d") else group._replace(defense="")


def _crafted(groups: Groups) -> Iterator[tuple[Group, list[Row]]]:
    """The first attacked group of each set of images: what is wrong with an attack is said once."""
    seen = set()
    for group, rows in _attacked(groups):
        if _made_for(group) not in seen:
            seen.add(_made_for(group))
            yield group, rows


def _won(row: Row) -> bool:
    """Whether the attack reached its goal: there a loss may well be flat."""
    return bool(row["success"].get("targeted" if "targeted" in row["success"] else "untargeted"))


def _flag(name: str, reason: str, group: Group, rows: Sequence[Row]) -> Flag:
    return Flag(name, reason, *group, norm=rows[0]["norm"])


def _craft_flag(name: str, reason: str, group: Group, rows: Sequence[Row]) -> Flag:
    """A doubt about the attacked images, and so about every defense judged on them."""
    return _flag(name, reason, _made_for(group), rows)


def _untargeted(rows: Sequence[Row]) -> bool:
    return str(rows[0]["goal"]) in ("untargeted", "margin", "feature", "feature-words", "answer")


def _mean(rows: Sequence[Row]) -> float:
    values = [value for row in rows if not math.isnan(value := score(row))]
    return statistics.fmean(values) if values else math.nan


def _clean_mean(groups: Groups, group: Group) -> float:
    """The clean score of the group's defense, 0 where it isn't there."""
    clean = groups.get(Group(group.task, group.defense, "clean", CLEAN, 0.0), [])
    return _mean(clean) if clean else 0.0


def _differences(pairs: Sequence[tuple[Row, Row]]) -> list[float]:
    found = [score(first) - score(second) for first, second in pairs]
    return [value for value in found if not math.isnan(value)] or [math.nan]


def _gap(pairs: Sequence[tuple[Row, Row]], clean: float) -> float:
    """Mean of first - second where it is clearly positive, else 0."""
    found = _differences(pairs) if pairs else [math.nan]
    mean = statistics.fmean(found)
    return mean if mean > max(MEANINGFUL * clean, STANDARD_ERRORS * _error(found)) else 0.0


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _objective_gap(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Share of the images on which the second attack reaches a lower objective, where that is so on average."""
    found = []
    for first, second in pairs:
        here, there = first["objective"].get("defended"), second["objective"].get("defended")
        if here is not None and there is not None and not first.get("skipped"):
            found.append(float(here) - float(there))
    if len(found) < 2 or statistics.fmean(found) <= max(1e-3, STANDARD_ERRORS * _error(found)):
        return 0.0
    return sum(value > 0 for value in found) / len(found)


def _has_less(other: Group, smaller: Sequence[Row], group: Group, rows: Sequence[Row]) -> bool:
    """Whether ``other`` is the same attack with a smaller eps, or with fewer steps and all else equal."""
    if other.attack == group.attack:
        return other == group._replace(eps=other.eps) and other.eps < group.eps
    named = other.attack.partition(":")[0] == group.attack.partition(":")[0]
    if not named or other != group._replace(attack=other.attack):
        return False
    less, more = _spent(smaller), _spent(rows)
    return less != more and less.keys() == more.keys() and all(less[key] <= more[key] for key in less)


def _spent(rows: Sequence[Row]) -> dict[str, int]:
    return next((row["budget"] for row in rows if row.get("budget")), {})


def _peers(groups: Groups, group: Group, access: str) -> Iterator[tuple[Group, list[Row]]]:
    """Untargeted attacks of one kind of access on the same figure; bounds of their own cannot be compared."""
    if group.eps == 0:
        return
    for other, rows in groups.items():
        same = other == group._replace(attack=other.attack) and other.attack != CLEAN
        if same and rows[0]["access"] == access and _untargeted(rows):
            yield other, rows
