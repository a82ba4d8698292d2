"""Metrics of answers: each maps ``(answers, examples)`` to one score per example, ``[N]``; nan = not scored.

Captions: ``cider_d`` (headline), ``bleu4``, ``rouge_l``. Questions: ``vqa_accuracy`` (headline), ``exact_match``.
Scenes: ``tag_recall``, ``all_tags``, ``exact_tags``. Attacks: ``untargeted_success``, ``targeted_success`` (higher is
better for the attacker; their nan are the examples outside the denominator). Images: ``psnr``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codefend.core.assets import needs
from codefend.tasks.cider import DocumentFrequencies, caption_tokens, cider_d, document_frequencies
from codefend.tasks.intervals import Interval, MeanScore, bootstrap_interval, mean_score, paired_difference_interval
from codefend.types import Example, Metric

__all__ = [
    "CAPTION_METRICS",
    "METRICS",
    "VQA_METRICS",
    "DocumentFrequencies",
    "Interval",
    "MeanScore",
    "all_tags",
    "attack_success",
    "bleu4",
    "bootstrap_interval",
    "caption_metrics",
    "caption_tokens",
    "cider_d",
    "corpus_bleu4",
    "document_frequencies",
    "exact_match",
    "exact_tags",
    "holds_phrase",
    "mean_score",
    "normalize_answer",
    "paired_difference_interval",
    "psnr",
    "rouge_l",
    "tag_recall",
    "targeted_success",
    "untargeted_success",
    "vqa_accuracy",
]

_COUNTING = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_COUNTING.split())}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# The words whose apostrophe the challenge restores; "let's", "she's" and "I'm" are in its list too, without effect.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}


def bleu4(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """Sentence BLEU-4 of each caption against all its references, ``[N]`` in [0, 1].

    sacrebleu's "exp" smoothing and effective order (short captions count only the n-grams they can hold). For tables
    use ``corpus_bleu4``: the mean of these isn't BLEU. Raises CodefendError when sacrebleu isn't installed.
    Source: Papineni et al. 2002; Chen and Cherry 2014, smoothing 3.
    """
    bleu = _sacrebleu(smooth_method="exp", effective_order=True)

    def score(answer: str, references: Sequence[str]) -> float:
        return float(bleu.sentence_score(_spaced(answer), [_spaced(text) for text in references]).score) / 100

    return _each(score, answers, examples)


def corpus_bleu4(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """BLEU-4 of all captions together, unsmoothed, in [0, 1]; examples without references are left out.

    nan when none has references. Raises CodefendError when sacrebleu isn't installed. Source: Papineni et al. 2002.
    """
    scored = [(a, e.references) for a, e in zip(answers, examples, strict=True) if e.references]
    if not scored:
        return math.nan
    streams = [  # sacrebleu expects the i-th reference of every answer, None where an answer has fewer
        [_spaced(references[i]) if i < len(references) else None for _, references in scored]
        for i in range(max(len(references) for _, references in scored))
    ]
    bleu = _sacrebleu(smooth_method="none", effective_order=False)
    return float(bleu.corpus_score([_spaced(answer) for answer, _ in scored], streams).score) / 100


def rouge_l(answers: Sequence[str], examples: Sequence[Example], *, beta: float = 1.2) -> Tensor:
    """ROUGE-L of each caption, ``[N]`` in [0, 1]: F-measure of the longest common subsequence.

    Precision and recall are each the best over the references and ``beta`` weighs recall, as COCO caption evaluation
    does; ``rouge-score`` (no release since 2022) and ``torchmetrics`` have the plain F1 for one reference at a time.
    Source: Lin 2004, eq. 2-4; Chen et al. 2015 (COCO captions).
    """

    def score(answer: str, references: Sequence[str]) -> float:
        candidate = caption_tokens(answer)
        tokens = [caption_tokens(text) for text in references]
        common = [_common_subsequence(candidate, reference) for reference in tokens]
        precision = max(common) / max(1, len(candidate))
        recall = max(length / max(1, len(reference)) for length, reference in zip(common, tokens, strict=True))
        return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0

    return _each(score, answers, examples)


def vqa_accuracy(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """VQA soft accuracy of each answer, ``[N]`` in [0, 1], after ``normalize_answer`` on both sides.

    With ten references or more: min(agreeing / 3, 1) over the others' answers, averaged over leaving out each
    annotator. With fewer: the fraction of references that agree. The official script normalizes references only where
    annotators disagree; here always, so "T-shirt" answers "t-shirt". Source: Antol et al. 2015; Goyal et al. 2017.
    """

    def score(answer: str, references: Sequence[str]) -> float:
        agree, n = sum(normalize_answer(text) == normalize_answer(answer) for text in references), len(references)
        if n < 10:
            return agree / n
        # Leaving out one of those that agree leaves agree - 1.
        return (agree * min(1.0, (agree - 1) / 3) + (n - agree) * min(1.0, agree / 3)) / n

    return _each(score, answers, examples)


def exact_match(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """1 where the answer equals any reference after ``normalize_answer``, else 0, ``[N]``."""

    def score(answer: str, references: Sequence[str]) -> float:
        return float(normalize_answer(answer) in map(normalize_answer, references))

    return _each(score, answers, examples)


def tag_recall(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """Fraction of ``example.tags`` that the answer holds as whole words or phrases, ``[N]``; nan without tags.

    Case and punctuation don't count; "cat" isn't in "cats" or "category". Recall only: naming more objects than the
    image has isn't punished.
    """
    recalls = [
        sum(holds_phrase(answer, tag) for tag in example.tags) / len(example.tags) if example.tags else math.nan
        for answer, example in zip(answers, examples, strict=True)
    ]
    return torch.tensor(recalls)


def all_tags(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """1 where every tag is present (every object is named), else 0, ``[N]``; nan without tags."""
    recall = tag_recall(answers, examples)
    return torch.where(recall.isnan(), recall, (recall == 1).to(recall.dtype))


def exact_tags(things: Iterable[str], colours: Iterable[str]) -> Metric:
    """The metric that is 1 where an answer names exactly the things of the first reference, else 0; nan if it has none.

    Every thing with its colour where the reference gives one, and no other word of the vocabulary: a thing that isn't
    there, a wrong colour, or a colour where the reference has none makes the caption wrong. A colour belongs to the
    thing right behind it; naming the same thing again ("the car") is no mistake. Raises ValueError for a name of
    several words.
    """
    known, shades = frozenset(things), frozenset(colours)
    if any(" " in word for word in known | shades):
        raise ValueError("exact_tags takes names of one word")

    def exact(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        scores = []
        for answer, example in zip(answers, examples, strict=True):
            expected = _mentions(example.references[0], known, shades) if example.references else frozenset()
            scores.append(float(_mentions(answer, known, shades) == expected) if expected else math.nan)
        return torch.tensor(scores)

    return exact


def _mentions(text: str, things: frozenset[str], colours: frozenset[str]) -> frozenset[tuple[str, str]]:
    """The objects that ``text`` mentions, as (colour, thing); one of the two is empty where it is missing."""
    mentions, shade = set(), ""
    for word in caption_tokens(text):
        if word in things:
            mentions.add((shade, word))
            shade = ""
        else:
            mentions |= {(shade, "")} if shade else set()
            shade = word if word in colours else ""
    mentions |= {(shade, "")} if shade else set()
    coloured = {thing for colour, thing in mentions if colour and thing}
    return frozenset((colour, thing) for colour, thing in mentions if colour or thing not in coloured)


def attack_success(clean: Tensor, attacked: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Untargeted success from two score vectors: 1 where a correct answer became a wrong one, else 0, ``[N]``.

    An answer is correct at ``threshold`` or more. nan where the clean answer was wrong or either wasn't scored, so that
    the mean is over correct clean answers. Use a metric in [0, 1] (``vqa_accuracy``, ``all_tags``), or another
    threshold. Raises ValueError when the shapes differ.
    """
    if clean.shape != attacked.shape:
        raise ValueError(f"clean and attacked scores differ in shape: {tuple(clean.shape)}, {tuple(attacked.shape)}")
    outside = ~(clean >= threshold) | attacked.isnan()
    return (attacked < threshold).float().masked_fill(outside, math.nan)


def untargeted_success(metric: Metric, clean_answers: Sequence[str], *, threshold: float = 0.5) -> Metric:
    """The metric that is 1 where ``metric`` accepts the clean answer and rejects this one; see ``attack_success``."""

    def success(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        return attack_success(metric(clean_answers, examples), metric(answers, examples), threshold=threshold)

    return success


def targeted_success(target: str, clean_answers: Sequence[str] | None = None) -> Metric:
    """The metric that is 1 where the answer contains ``target`` word for word (case and punctuation ignored), else 0.

    nan where the clean answer already contains it. Raises ValueError when the target has no words.
    """
    if not caption_tokens(target):
        raise ValueError(f"the target {target!r} has no words")

    def success(answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
        scores = torch.tensor([float(holds_phrase(a, target)) for a, _ in zip(answers, examples, strict=True)])
        if clean_answers is None:
            return scores
        before = [holds_phrase(clean, target) for clean, _ in zip(clean_answers, examples, strict=True)]
        return scores.masked_fill(torch.tensor(before, dtype=torch.bool), math.nan)

    return success


def caption_metrics(references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """The caption metrics with CIDEr-D bound to the document frequencies of a whole test set's ``references``."""
    return {**CAPTION_METRICS, "cider_d": partial(cider_d, frequencies=document_frequencies(references))}


def _each(score: Callable[[str, Sequence[str]], float], answers: Sequence[str], examples: Sequence[Example]) -> Tensor:
    """``score(answer, references)`` of every example, nan where there are no references."""
    pairs = zip(answers, examples, strict=True)
    return torch.tensor([score(a, e.references) if e.references else math.nan for a, e in pairs])


def _spaced(text: str) -> str:
    return " ".join(caption_tokens(text))


def _sacrebleu(*, smooth_method: str, effective_order: bool) -> Any:
    with needs("BLEU", "bench"):
        from sacrebleu.metrics.bleu import BLEU
    return BLEU(tokenize="none", smooth_method=smooth_method, effective_order=effective_order, force=True)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by rows of the usual table."""
    row = [0] * (len(b) + 1)
    for word in a:
        above = row
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def holds_phrase(text: str, phrase: str) -> bool:
    """Whether the words of ``phrase`` occur in ``text`` side by side and in order."""
    return f" {_spaced(phrase)} " in f" {_spaced(text)} "


CAPTION_METRICS: dict[str, Metric] = {"cider_d": cider_d, "bleu4": bleu4, "rouge_l": rouge_l}
VQA_METRICS: dict[str, Metric] = {"vqa_accuracy": vqa_accuracy, "exact_match": exact_match}
METRICS: dict[str, Metric] = {**CAPTION_METRICS, **VQA_METRICS, "tag_recall": tag_recall, "all_tags": all_tags}


def normalize_answer(text: str) -> str:
    """Normalize an answer by the rules of the VQA challenge (Antol et al. 2015; Goyal et al. 2017).

    Lower case, no punctuation, no articles, number words as digits ("none" is 0), apostrophes restored.

    Punctuation becomes nothing where it touches a space anywhere in the answer, or when digits hold a comma
    ("1,000"), and a space elsewhere ("t-shirt" -> "t shirt"); a period stays only before a digit.
    Source: the evaluation script of visualqa.org.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = _DIGIT_COMMA.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        touches_space = mark + " " in text or " " + mark in text
        plain = plain.replace(mark, "" if grouped or touches_space else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", plain).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``[B,C,H,W]`` in [0, 1] -> ``[B]``; inf where the images are equal.

    Own code: torchmetrics takes seconds to import and brings lightning-utilities. Raises ValueError when shapes differ.
    """
    _check(a, b)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"expected two batches [B,C,H,W] of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
