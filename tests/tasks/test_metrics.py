"""Metrics against independent implementations. The figures below were produced outside the project by

- ``pycocoevalcap`` 1.2 (Cider, Rouge, Bleu on whitespace tokens; PTBTokenizer on Java 17),
- ``rouge-score`` 0.1.2 and ``nltk`` 3.10.4 (SmoothingFunction.method3),
- the official VQA evaluation script (GT-Vision-Lab/VQA, vqaEval.py, print statements ported to Python 3).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import pytest
import torch

from codefend.tasks import intervals
from codefend.tasks import metrics as m
from codefend.types import CodefendError, Example

REFERENCES = (
    ("a red apple on green grass", "an apple lies on the grass", "a shiny red apple in a meadow"),
    ("a dog next to a car", "a brown dog and a blue car"),
    (
        "two cats sit on a sofa",
        "a pair of cats on a couch",
        "two sleeping cats",
        "cats lying on a grey sofa near a lamp",
        "two cats",
    ),
    ("a boat", "a small boat on the lake"),
    ("a man rides a bicycle down the street", "a cyclist on a city street next to a bus"),
    ("a blue umbrella and a yellow chair on the beach",),
)
CAPTIONS = (
    "a red apple on the grass",
    "a cat next to a car",
    "two two two cats on a sofa sofa",
    "boat",
    "",
    "a blue umbrella and a yellow chair on the beach",
)
CIDER = [3.470431, 2.689224, 1.189702, 1.737585, 0.0, 10.0]  # pycocoevalcap
ROUGE = [0.833333, 0.833333, 0.802632, 0.628866, 0.0, 1.0]  # pycocoevalcap
BLEU_NLTK = [0.707107, 0.537285, 0.330316, math.exp(-1), 0.0, 1.0]  # nltk; "boat" by hand: brevity exp(1 - 2/1)


def examples(references: Sequence[Sequence[str]], tags: Sequence[Sequence[str]] | None = None) -> list[Example]:
    tags = tags or [()] * len(references)
    return [
        Example(str(i), torch.zeros(3, 1, 1), "?", tuple(r), tags=tuple(t))
        for i, (r, t) in enumerate(zip(references, tags, strict=True))
    ]


def close(actual: torch.Tensor, expected: Sequence[float], atol: float = 2e-6) -> None:
    assert actual.shape == (len(expected),)
    torch.testing.assert_close(actual, torch.tensor(expected), atol=atol, rtol=1e-6, equal_nan=True)


# --- captions --------------------------------------------------------------------------------------------------------


def test_cider_d_matches_pycocoevalcap() -> None:
    close(m.cider_d(CAPTIONS, examples(REFERENCES)), CIDER)
    pair = [REFERENCES[0][:2], REFERENCES[1]]
    close(m.cider_d(CAPTIONS[:2], examples(pair)), [4.517038, 3.00482])


def test_cider_d_with_bound_frequencies_does_not_depend_on_the_parts() -> None:
    cider = m.caption_metrics(REFERENCES)["cider_d"]
    parts = [cider(CAPTIONS[i : i + 1], examples(REFERENCES[i : i + 1])) for i in range(6)]
    close(torch.cat(parts), CIDER)


def test_cider_d_is_nan_where_it_is_undefined() -> None:
    assert m.cider_d(CAPTIONS[:1], examples(REFERENCES[:1])).isnan().all()  # one image: every idf is zero
    scores = m.cider_d(CAPTIONS, examples((*REFERENCES[:5], ())))
    assert scores.isnan().tolist() == [False] * 5 + [True]
    assert m.document_frequencies([*REFERENCES, ()]).documents == 6


def test_bleu_matches_nltk_and_pycocoevalcap() -> None:
    close(m.bleu4(CAPTIONS, examples(REFERENCES)), BLEU_NLTK)
    assert m.corpus_bleu4(CAPTIONS, examples(REFERENCES)) == pytest.approx(0.540624, abs=2e-6)
    pair = examples([REFERENCES[0][:2], REFERENCES[1]])
    assert m.corpus_bleu4(CAPTIONS[:2], pair) == pytest.approx(0.625194, abs=2e-6)
    assert m.corpus_bleu4((*CAPTIONS, "x"), examples((*REFERENCES, ()))) == pytest.approx(0.540624, abs=2e-6)
    assert math.isnan(m.corpus_bleu4(["x"], examples([()])))


def test_bleu_names_the_extra_when_sacrebleu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(CodefendError, match=r"pip install 'codefend\[bench\]'"):
        m.bleu4(CAPTIONS, examples(REFERENCES))


def test_rouge_l_matches_pycocoevalcap_and_rouge_score() -> None:
    close(m.rouge_l(CAPTIONS, examples(REFERENCES)), ROUGE)
    first = examples([r[:1] for r in REFERENCES])
    close(m.rouge_l(CAPTIONS, first, beta=1.0), [0.833333, 0.833333, 0.714286, 0.666667, 0.0, 1.0])


@pytest.mark.parametrize(
    ("text", "tokens"),  # PTBTokenizer, -lowerCase, punctuation removed
    [
        ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
        ("A dog's bone, next to the dogs' bowl!", "a dog 's bone next to the dogs bowl"),
        ("Two people don't look at a T-shirt; they can't.", "two people do n't look at a t-shirt they ca n't"),
        ('The sign says "STOP" in red.', "the sign says stop in red"),
        ("A black-and-white cat is sitting on a sofa...", "a black-and-white cat is sitting on a sofa"),
        ("A man's hat isn't o'clock", "a man 's hat is n't o'clock"),
        ("She cannot see it -- they're gone, and we'll go", "she can not see it they 're gone and we 'll go"),
        ("a girl in a café eating crème brûlée", "a girl in a café eating crème brûlée"),
        ("it's 3:30, 1,000 chips", "it 's 3:30 1,000 chips"),
        ("the dog’s “ball” is red", "the dog 's ball is red"),
    ],
)
def test_caption_tokens_match_the_treebank_tokenizer(text: str, tokens: str) -> None:
    assert m.caption_tokens(text) == tokens.split()


def test_caption_metrics_ignore_case_and_punctuation() -> None:
    shouted = [f"{text.upper()}!" for text in CAPTIONS]
    for name in ("cider_d", "bleu4", "rouge_l"):
        metric = m.METRICS[name]
        assert torch.equal(metric(shouted, examples(REFERENCES)), metric(CAPTIONS, examples(REFERENCES)))


# --- questions -------------------------------------------------------------------------------------------------------

# The official script's processPunctuation, then processDigitArticle.
NORMALIZED = r"""
Yes. -> yes | No! -> no | The red, white and blue. -> red white and blue | t-shirt -> t shirt | 1,000 -> 1000
10,000 people, or so -> 10000 people or so | 3.5 -> 3.5 | 3. 5 -> 3 5 | a.m. -> am | $5.00 -> $5.00 | two -> 2
None -> 0 | TEN o clock -> 10 o clock | oclock -> o'clock | dont -> don't | couldntve -> couldntve
couldn'tve -> couldn't've | wouldnt've -> wouldn't've | whats up? -> what's up | it's -> it's | its -> its
y'alld've -> y'all'd've | twas -> 'twas | ow's'at -> 'ow's'at | left/right -> left right | left / right -> left right
(maybe) -> maybe | hello   world -> hello world | an apple a day -> apple day | The -> | 10-12 -> 10 12 | 1,2-3 -> 123
e-mail@example.com -> e mail examplecom | 12:30 -> 12:30 | 50% -> 50% | #4 -> #4 | let's -> let's | shes -> shes
hed've -> he'd've | U.S.A. -> usa | mr. smith -> mr smith | [a] -> | >3 -> 3 | I'm -> i'm | im -> im | wont -> won't
x=y+z -> x y z | under_score -> under score | `tick` -> tick
"""


@pytest.mark.parametrize("case", NORMALIZED.strip().replace("\n", " | ").split(" | "))
def test_answers_are_normalized_as_the_official_script_does(case: str) -> None:
    text, expected = case.split(" ->")
    assert m.normalize_answer(text) == expected.strip()


def test_line_breaks_and_tabs_are_spaces() -> None:
    assert m.normalize_answer("a\nnew\tline, ") == "new line"


@pytest.mark.parametrize(
    ("answer", "references", "accuracy"),  # the official script
    [
        ("Yes.", ["yes"] * 7 + ["no"] * 3, 1.0),
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
        ("no", ["yes"] * 9 + ["no"], 0.3),
        ("Two dogs", ["2 dogs"] * 3 + ["dogs"] * 7, 0.9),
        ("the red t-shirt", ["red t shirt"] * 4 + ["shirt"] * 6, 1.0),
        ("1,000", ["1000"] * 3 + ["1"] * 7, 0.9),
        ("cat", ["dog"] * 9 + ["wolf"], 0.0),
        ("dont walk", ["don't walk"] * 2 + ["stop"] * 8, 0.6),
        ("maybe", ["yes"] * 10, 0.0),
        ("an apple, a pear", ["apple pear"] + ["apple"] * 9, 0.3),
    ],
)
def test_vqa_accuracy_matches_the_official_script(answer: str, references: list[str], accuracy: float) -> None:
    close(m.vqa_accuracy([answer], examples([references])), [accuracy])


def test_vqa_accuracy_with_few_references_is_the_fraction_that_agree() -> None:
    questions = examples([["yes"], ["no"], ["red", "crimson"], ["two", "2", "three", "4"], ()])
    close(m.vqa_accuracy(["Yes", "yes", "red.", "2", "x"], questions), [1.0, 0.0, 0.5, 0.5, math.nan])


def test_vqa_accuracy_normalizes_references_even_where_annotators_agree() -> None:
    close(m.vqa_accuracy(["T-shirt"], examples([["t-shirt"] * 10])), [1.0])  # the official script says 0


def test_exact_match_takes_any_reference() -> None:
    questions = examples([["left", "to the left"], ["two"], ["cat"], ()])
    close(m.exact_match(["To the left.", "2", "a dog", "x"], questions), [1.0, 1.0, 0.0, math.nan])


# --- scenes ----------------------------------------------------------------------------------------------------------


def test_tags_count_as_whole_words_and_phrases() -> None:
    tags = [("red apple", "dog"), ("cat",), ("cat", "ice cream", "hat"), ("cat",), ()]
    answers = ["A red apple, and a dog!", "the category of cats", "Ice cream on a cat", "", "anything"]
    scenes = examples([()] * 5, tags)
    close(m.tag_recall(answers, scenes), [1.0, 0.0, 2 / 3, 0.0, math.nan])
    close(m.all_tags(answers, scenes), [1.0, 0.0, 0.0, 0.0, math.nan])


def test_a_phrase_must_be_in_order_and_unbroken() -> None:
    scenes = examples([()] * 3, [("red apple",)] * 3)
    close(m.all_tags(["an apple that is red", "a red shiny apple", "two. red apple"], scenes), [0.0, 0.0, 1.0])


# --- attacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("a red car and a dog", 1),
        ("There is a dog, and a Red CAR in the top left.", 1),
        ("a red car, a dog; the car is next to the dog", 1),
        ("a red car", 0),  # the dog is missing
        ("a car and a dog", 0),  # its colour is missing
        ("a blue car and a dog", 0),
        ("a red car, a dog and a cat", 0),  # all_tags calls these four right
        ("a red car, a blue car and a dog", 0),
        ("a red car and a blue dog", 0),
        ("a red car and a dog on blue", 0),
        ("red dog and a car", 0),
        ("", 0),
    ],
)
def test_exact_tags_require_each_thing_in_its_colour_and_nothing_else(answer: str, right: int) -> None:
    scene = examples([["a red car and a dog", "some other wording"]], [["car", "dog"]])
    assert m.exact_tags(["car", "dog", "cat"], ["red", "blue"])([answer], scene).tolist() == [right]


def test_exact_tags_need_a_reference_that_names_something() -> None:
    metric = m.exact_tags(["car"], ["red"])
    assert metric(["a car"] * 2, examples([[], ["nothing to see"]])).isnan().all()
    with pytest.raises(ValueError, match="one word"):
        m.exact_tags(["fire engine"], [])


def test_exact_tags_on_the_shipped_captions() -> None:
    from codefend.tasks import load

    known = load("caption", limit=64)
    strict = known.metrics["exact_tags"]
    for wording in range(4):
        assert strict([e.references[wording] for e in known.examples], known.examples).eq(1).all()
    others = [known.examples[i - 1].references[0] for i in range(64)]
    both = [f"{e.references[0]} and {other}" for e, other in zip(known.examples, others, strict=True)]
    assert known.metrics["all_tags"](both, known.examples).eq(1).all()
    assert strict(both, known.examples).mean() < 0.1


def test_untargeted_success_counts_correct_clean_answers_only() -> None:
    questions = examples([["yes"], ["yes"], ["yes"], ["yes"], ()])
    success = m.untargeted_success(m.vqa_accuracy, ["yes", "yes", "no", "no", "yes"])
    scores = success(["no", "yes", "no", "yes", "no"], questions)
    close(scores, [1.0, 0.0, math.nan, math.nan, math.nan])
    assert m.mean_score(scores) == (0.5, 2)


def test_attack_success_threshold_and_shapes() -> None:
    clean, attacked = torch.tensor([0.9, 0.3, 1.0, math.nan]), torch.tensor([0.3, 0.0, math.nan, 0.0])
    close(m.attack_success(clean, attacked), [1.0, math.nan, math.nan, math.nan])
    close(m.attack_success(clean, attacked, threshold=0.3), [0.0, 1.0, math.nan, math.nan])
    with pytest.raises(ValueError, match="differ in shape"):
        m.attack_success(clean, attacked[:1])


def test_targeted_success_requires_the_sentence_word_for_word() -> None:
    four = examples([()] * 4)
    answers = ["It says: VISIT example.com now!", "visit the example.com", "revisit example.com", "visit example.com"]
    close(m.targeted_success("Visit example.com")(answers, four), [1.0, 0.0, 0.0, 1.0])
    before = ["a cat", "a cat", "a cat", "visit example.com"]
    close(m.targeted_success("Visit example.com", before)(answers, four), [1.0, 0.0, 0.0, math.nan])
    with pytest.raises(ValueError, match="no words"):
        m.targeted_success(" ... ")


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", m.METRICS)
def test_every_metric_gives_one_score_per_example(name: str) -> None:
    scene = examples(REFERENCES[:3], [("apple",), ("dog",), ("cats",)])
    metric = m.METRICS[name]
    answers = [r[0] for r in REFERENCES[:3]]
    right, wrong = metric(answers, scene), metric(["zebra"] * 3, scene)
    assert right.shape == wrong.shape == (3,)
    assert right.dtype == torch.float32
    assert (right > wrong).all()
    assert metric([], []).shape == (0,)
    bare = [Example("0", torch.zeros(3, 1, 1), "?")]
    assert metric(["x"], bare).isnan().all()
    with pytest.raises(ValueError, match="zip"):
        metric(["x"], scene)


# --- means and intervals ---------------------------------------------------------------------------------------------


def test_mean_score_leaves_out_unscored_examples() -> None:
    assert m.mean_score(torch.tensor([1.0, math.nan, 0.0, 1.0])) == (pytest.approx(2 / 3), 3)
    mean, count = m.mean_score(torch.tensor([math.nan]))
    assert math.isnan(mean)
    assert count == 0


def test_bootstrap_interval_agrees_with_the_normal_approximation() -> None:
    scores = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 3
    interval = m.bootstrap_interval(torch.cat([scores, torch.tensor([math.nan])]))
    half = 1.96 * scores.std().item() / 20
    assert interval.n == 400
    assert interval.mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.15 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.15 * half)
    narrower = m.bootstrap_interval(scores, confidence=0.5)
    assert interval.low < narrower.low < narrower.high < interval.high


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(0, 10, 0.0, 0.278), (8, 10, 0.490, 0.943), (10, 10, 0.722, 1.0)]
)
def test_share_interval_gives_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    interval = intervals.share_interval(successes, n)
    assert interval[1:3] == pytest.approx((low, high), abs=1e-3)
    assert (interval.mean, interval.n) == (successes / n, n)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_share_interval_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes must lie between"):
        intervals.share_interval(successes, n)


def test_bootstrap_interval_is_reproducible_and_takes_a_generator() -> None:
    scores = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.25])
    assert m.bootstrap_interval(scores) == m.bootstrap_interval(scores)
    seeded = [m.bootstrap_interval(scores, samples=50, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_bootstrap_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(37, generator=torch.Generator().manual_seed(5))
    whole = m.bootstrap_interval(scores, samples=101)
    monkeypatch.setattr(intervals, "BLOCK", 37 * 10)
    assert m.bootstrap_interval(scores, samples=101) == whole
    monkeypatch.setattr(intervals, "BLOCK", 1)
    assert m.bootstrap_interval(scores, samples=101) == whole


def test_groups_widen_the_interval_of_repeated_examples() -> None:
    scores = torch.tensor([0.0, 1.0] * 20).repeat_interleave(10)  # 40 images of 10 identical questions
    keys = [i // 10 for i in range(400)]
    alone, grouped = m.bootstrap_interval(scores), m.bootstrap_interval(scores, groups=keys)
    assert grouped.mean == alone.mean == 0.5
    assert grouped.n == 400
    assert 2.7 < (grouped.high - grouped.low) / (alone.high - alone.low) < 3.7  # sqrt(10) in the limit


def test_group_means_weigh_examples_not_groups() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan])
    assert m.bootstrap_interval(scores, groups=["a", "a", "a", "b", "c"]).mean == 0.75


def test_too_few_scores_have_no_interval() -> None:
    for scores in (torch.tensor([]), torch.tensor([1.0, math.nan])):
        interval = m.bootstrap_interval(scores)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
    assert m.bootstrap_interval(torch.tensor([1.0])).mean == 1.0


def test_a_paired_difference_is_narrower_than_separate_intervals() -> None:
    baseline = torch.randn(200, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(200, generator=torch.Generator().manual_seed(3))
    better = baseline + 0.05 + 0.1 * noise
    better[0] = math.nan
    paired = m.paired_difference_interval(better, baseline)
    assert paired.n == 199
    assert 0 < paired.low < 0.05 < paired.high
    assert m.bootstrap_interval(better).low < m.bootstrap_interval(baseline).mean  # they overlap
    with pytest.raises(ValueError, match="differ in shape"):
        m.paired_difference_interval(better, baseline[:1])


def test_invalid_interval_arguments_are_errors() -> None:
    scores = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="confidence"):
        m.bootstrap_interval(scores, confidence=95)
    with pytest.raises(ValueError, match="samples"):
        m.bootstrap_interval(scores, samples=0)
    with pytest.raises(ValueError, match="groups has 1"):
        m.bootstrap_interval(scores, groups=["a"])
