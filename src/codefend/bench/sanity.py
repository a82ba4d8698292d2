"""Sanity checks of an evaluation: evidence, in the rows alone, that an attack was weaker than it could have been.

Every check is a pure function from groups of rows to flags. After Carlini et al. 2019 (arXiv 1902.06705), Athalye et
al. 2018 (arXiv 1802.00420, section 3.1) and AutoAttack's checks. A flag is a reason to examine a figure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from codefend.attacks.specs import UNTARGETED
from codefend.bench.results import BARE, CLEAN, Group, eps_label, group_rows, pair_rows, score
from codefend.core.runs import Row

Groups = dict[Group, list[Row]]

ZERO_SHARE = 0.1  # of the gradient steps exactly zero
VANISHING = 1e-9  # median l2 norm of the gradient of a loss in nats
EXPLODING = 1e5  # largest over median norm
HUGE = 1e8  # median l2 norm of the same gradient
MEANINGFUL = 0.02  # differences of score below this share of the clean score raise no flag
STANDARD_ERRORS = 2.0  # a smaller paired difference is not significant
UNCONVERGED = 0.25  # share of examples whose loss still fell at the end
ROBUST = 0.1  # share of the clean score; below it a stronger attack could gain little
OVERFITTED = 0.1  # share of an attack's gain that is lost under fresh noise; at 0.13 a score of .15 was measured as .25
UNBOUNDED = 0.5  # l-inf radius at which every pixel can be grey
ENOUGH = 100  # examples, for a 95% interval of a share of about +-10 points


@dataclass(frozen=True)
class Flag:
    """One warning: which check, why, and about which figure (empty and None: about all)."""

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
        """The label of the figure."""
        parts = (self.task, self.defense, self.threat, self.attack, eps_label(self.eps or 0.0, self.norm))
        return " · ".join(part for part in parts if part)

    def covers(self, group: Group) -> bool:
        """Whether the warning is about this figure."""
        mine = (self.task, self.defense, self.threat, self.attack, self.eps)
        return all(a in ("", None) or a == b for a, b in zip(mine, group, strict=True))


def check(rows: Iterable[Row]) -> list[Flag]:
    """Every flag of every check, in the order of ``CHECKS``."""
    groups = group_rows(rows)
    return [flag for run in CHECKS.values() for flag in run(groups)]


# --- one group at a time ---------------------------------------------------------------------------------------------


def budget_violated(groups: Groups) -> Iterable[Flag]:
    """The attack left its ball or the pixel range: the figure is not one of this threat model."""
    for group, rows in _crafted(groups):
        bad = [row["violation"] for row in rows if row.get("violation")]
        if bad:
            yield _craft_flag("budget violated", f"{len(bad)} of {len(rows)}: {bad[0]}", group, rows)


def gradient_zero(groups: Groups) -> Iterable[Flag]:
    """Gradients that are zero or vanish: the attack had no direction to follow, which isn't robustness."""
    for group, rows in _crafted(groups):
        gradients = [row["gradient"] for row in rows if row.get("gradient") and not _succeeded(row)]
        if not gradients:
            continue
        zero = statistics.fmean(g["zero_share"] for g in gradients)
        median = statistics.median(g["median"] for g in gradients)
        if zero > ZERO_SHARE:
            yield _craft_flag("zero gradient", f"{zero:.0%} of the gradients are exactly zero", group, rows)
        elif median < VANISHING:
            reason = f"the gradient vanishes: median norm {median:.1e}"
            yield _craft_flag("zero gradient", reason, group, rows)


def gradient_exploding(groups: Groups) -> Iterable[Flag]:
    """Gradients that are not finite, vary by orders of magnitude or are huge: no useful directions."""
    for group, rows in _crafted(groups):
        gradients = [row["gradient"] for row in rows if row.get("gradient") and not _succeeded(row)]
        infinite = sum(1 for g in gradients if g["nonfinite"] or g["max"] is None)
        ratios = [g["max"] / g["median"] for g in gradients if g["max"] is not None and g["median"]]
        if infinite:
            reason = f"gradients of {infinite} of {len(gradients)} examples are not finite"
            yield _craft_flag("exploding gradient", reason, group, rows)
        elif ratios and statistics.median(ratios) > EXPLODING:
            reason = f"the largest gradient is {statistics.median(ratios):.0e} times the median one"
            yield _craft_flag("exploding gradient", reason, group, rows)
        elif gradients and (median := statistics.median(g["median"] for g in gradients)) > HUGE:
            reason = f"the gradient is huge: median norm {median:.0e}"
            yield _craft_flag("exploding gradient", reason, group, rows)


def random_without_eot(groups: Groups) -> Iterable[Flag]:
    """Against a randomized defense, single gradient samples overestimate the robustness."""
    for group, rows in _through_noise(groups):
        if all(row["budget"]["eot"] == 1 for row in rows if row.get("budget")):
            reason = "the defense is randomized and the attack averaged one sample per step: raise eot"
            yield _flag("random without EOT", reason, group, rows)


def overfitted_to_noise(groups: Groups) -> Iterable[Flag]:
    """The attack overfitted to the noise that it sampled: under fresh noise part of its gain is lost."""
    for group, rows in _through_noise(groups):
        curves = [row for row in rows if row.get("curve") and row["objective"].get("source") is not None]
        gain = math.fsum(row["curve"]["start"] - row["curve"]["end"] for row in curves)
        fresh = math.fsum(row["curve"]["start"] - row["objective"]["source"] for row in curves)
        robust = _mean(rows) > ROBUST * _clean_mean(groups, group)
        if robust and gain > 0 and fresh < (1 - OVERFITTED) * gain:
            eot = curves[0]["budget"]["eot"]
            reason = f"{1 - fresh / gain:.0%} of the gain is lost under fresh noise: raise eot above {eot}"
            yield _flag("overfitted to noise", reason, group, rows)


def single_submission(groups: Groups) -> Iterable[Flag]:
    """A randomized defense has to withstand every submission of an image, not one."""
    flags: dict[tuple[str, str], Flag] = {}
    for group, rows in _attacked(groups):
        if rows[0]["randomized"] and group.threat != "T2d" and max(row["resubmissions"] for row in rows) == 1:
            reason = "the defense is randomized and each image was submitted once: raise resubmissions"
            flags.setdefault((group.task, group.defense), Flag("single submission", reason, group.task, group.defense))
    return list(flags.values())


def not_converged(groups: Groups) -> Iterable[Flag]:
    """The loss was still falling at the last step, and the score can fall further."""
    for group, rows in _crafted(groups):
        curves = [row["curve"] for row in rows if row.get("curve")]
        falling = sum(not curve["converged"] for curve in curves)
        if rows[0]["access"] == "control" or not curves or falling <= UNCONVERGED * len(curves):
            continue
        if _mean(rows) > ROBUST * _clean_mean(groups, group):
            reason = f"the loss still fell at the end on {falling} of {len(curves)} examples: raise steps"
            yield _craft_flag("not converged", reason, group, rows)


def robust_without_bound(groups: Groups) -> Iterable[Flag]:
    """Without a bound on the pixels no defense can be robust; one that seems so masks its gradients."""
    for group, rows in _attacked(groups):
        mean, clean = _mean(rows), _clean_mean(groups, group)
        free = rows[0]["norm"] == "linf" and group.eps >= UNBOUNDED
        if free and _untargeted(rows) and rows[0]["access"] != "control" and mean > ROBUST * clean:
            reason = f"score {mean:.2f} at an eps that allows any image"
            yield _flag("robust without bound", reason, group, rows)


# --- groups against one another --------------------------------------------------------------------------------------


def adaptive_weaker(groups: Groups) -> Iterable[Flag]:
    """An adaptive attack is weaker than an oblivious one: its gradient is masked, or it has too few steps."""
    for group, rows in _attacked(groups):
        for weaker in ("T0", "T1"):
            other = groups.get(group._replace(threat=weaker), [])
            if group.threat not in ("T2", "T2d") or not _untargeted(rows) or not other:
                continue
            worse = _gap(pair_rows(rows, other), _clean_mean(groups, group))
            reason = f"the score is {worse:.2f} higher than under {weaker} on the same images" if worse else ""
            if not worse and rows[0]["access"] == "white-box" and (share := _objective_gap(pair_rows(rows, other))):
                reason = f"on {share:.0%} of the images {weaker} lowers the attack's own objective further"
            if reason:
                yield _flag("adaptive weaker", reason, group, rows)


def budget_helps_defender(groups: Groups) -> Iterable[Flag]:
    """A larger eps, or more steps of the same attack, should lower the score."""
    for group, rows in _attacked(groups):
        if not _untargeted(rows):
            continue
        for other, smaller in _attacked(groups):
            if not _has_less(other, smaller, group, rows):
                continue
            gap = _gap(pair_rows(rows, smaller), _clean_mean(groups, group))
            if gap:
                less = f"{other.attack} {eps_label(other.eps, rows[0]['norm'])}"
                reason = f"the score is {gap:.2f} higher than under the smaller budget of {less}"
                yield _flag("larger budget helps the defender", reason, group, rows)


def black_box_wins(groups: Groups) -> Iterable[Flag]:
    """An attack on scores alone beats attacks with gradients: the gradients are masked."""
    for group, rows in _attacked(groups):
        if rows[0]["access"] != "score" or not _untargeted(rows):
            continue
        rivals = [peers for _, peers in _peers(groups, group, "white-box")]
        if not rivals:
            continue
        strongest = min(rivals, key=_mean)
        gap = _gap(pair_rows(strongest, rows), _clean_mean(groups, group))
        if gap:
            reason = f"the score is {gap:.2f} lower than under {strongest[0]['attack']}, which has the gradient"
            yield _flag("black box beats white box", reason, group, rows)


def noise_as_strong(groups: Groups) -> Iterable[Flag]:
    """Random noise of the same size lowers the score as much as an attack on the judged defense."""
    for group, rows in _attacked(groups):
        aimed = group.threat in ("T2", "T2d") or group.defense == BARE
        if not aimed or rows[0]["access"] == "control" or not _untargeted(rows):
            continue
        for other, noise in _peers(groups, group, "control"):
            pairs, clean = pair_rows(noise, rows), _clean_mean(groups, group)
            if pairs and statistics.fmean(_differences(pairs)) <= MEANINGFUL * clean and clean > 0:
                reason = f"{other.attack} of the same size lowers the score as much"
                yield _flag("noise as strong", reason, group, rows)


def too_few(groups: Groups) -> Iterable[Flag]:
    """Too few examples for a narrow confidence interval."""
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


CHECKS: dict[str, Callable[[Groups], Iterable[Flag]]] = {
    "budget violated": budget_violated,
    "zero gradient": gradient_zero,
    "exploding gradient": gradient_exploding,
    "random without EOT": random_without_eot,
    "overfitted to noise": overfitted_to_noise,
    "single submission": single_submission,
    "adaptive weaker": adaptive_weaker,
    "larger budget helps the defender": budget_helps_defender,
    "black box beats white box": black_box_wins,
    "noise as strong": noise_as_strong,
    "robust without bound": robust_without_bound,
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


def _image_group(group: Group) -> Group:
    """At T0 and T1 all defenses are judged on the same images."""
    return group if group.threat in ("T2", "T2d") else group._replace(defense="")


def _crafted(groups: Groups) -> Iterator[tuple[Group, list[Row]]]:
    """The first attacked group of each set of images, so that a weak attack is reported once."""
    first: dict[Group, Group] = {}
    for group, rows in _attacked(groups):
        if first.setdefault(_image_group(group), group) == group:
            yield group, rows


def _succeeded(row: Row) -> bool:
    """Whether the attack reached its goal, where a flat loss means nothing."""
    return bool(row["success"].get("targeted" if "targeted" in row["success"] else "untargeted"))


def _flag(name: str, reason: str, group: Group, rows: Sequence[Row]) -> Flag:
    return Flag(name, reason, *group, norm=rows[0]["norm"])


def _craft_flag(name: str, reason: str, group: Group, rows: Sequence[Row]) -> Flag:
    """A warning about the attacked images, and so about every defense judged on them."""
    return _flag(name, reason, _image_group(group), rows)


def _untargeted(rows: Sequence[Row]) -> bool:
    return rows[0]["goal"] in UNTARGETED


def _mean(rows: Sequence[Row]) -> float:
    values = [value for row in rows if not math.isnan(value := score(row))]
    return statistics.fmean(values) if values else math.nan


def _clean_mean(groups: Groups, group: Group) -> float:
    """The clean score of the group's defense, 0 without clean rows."""
    clean = groups.get(Group(group.task, group.defense, "clean", CLEAN, 0.0), [])
    return _mean(clean) if clean else 0.0


def _differences(pairs: Sequence[tuple[Row, Row]]) -> list[float]:
    values = [score(first) - score(second) for first, second in pairs]
    return [value for value in values if not math.isnan(value)] or [math.nan]


def _gap(pairs: Sequence[tuple[Row, Row]], clean: float) -> float:
    """Mean of first - second if it is significantly positive, else 0."""
    values = _differences(pairs) if pairs else [math.nan]
    mean = statistics.fmean(values)
    return mean if mean > max(MEANINGFUL * clean, STANDARD_ERRORS * _standard_error(values)) else 0.0


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _objective_gap(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Share of the images on which the second attack reaches a lower objective, if it does so on average."""
    values = []
    for first, second in pairs:
        here, there = first["objective"].get("defended"), second["objective"].get("defended")
        if here is not None and there is not None and not first.get("skipped"):
            values.append(float(here) - float(there))
    if len(values) < 2 or statistics.fmean(values) <= max(1e-3, STANDARD_ERRORS * _standard_error(values)):
        return 0.0
    return sum(value > 0 for value in values) / len(values)


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
    """Untargeted attacks of one kind of access on the same figure, not those with a bound of their own."""
    if group.eps == 0:
        return
    for other, rows in groups.items():
        same = other == group._replace(attack=other.attack) and other.attack != CLEAN
        if same and rows[0]["access"] == access and _untargeted(rows):
            yield other, rows
