"""CIDEr-D (Vedantam, Zitnick, Parikh 2015, arXiv:1411.5726) and the caption tokens that all caption metrics share.

Written here because no light package has it: ``pycocoevalcap`` is 104 MB of Java archives, unmaintained since 2020,
and ``aac-metrics`` pulls an audio stack and pins old NumPy and Transformers. Checked against ``pycocoevalcap``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codefend.types import Example

Ngram = tuple[str, ...]

_WORD = re.compile(r"\d+(?:[.,:]\d+)+|[^\W_]+(?:[-'][^\W_]+)*")
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))$")


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many of ``documents`` images each n-gram occurs in some reference."""

    counts: Mapping[Ngram, int]
    documents: int


def caption_tokens(text: str) -> list[str]:
    """Lower-case words without punctuation; clitics are split off ("dog's" -> dog 's) and inner hyphens stay.

    As COCO caption evaluation (Penn Treebank tokens, punctuation removed), without Java. Rare forms
    differ: abbreviations lose their periods, a slash parts words, and symbols such as & and $ are dropped.
    """
    tokens: list[str] = []
    for word in _WORD.findall(text.lower().replace("’", "'")):
        if word == "cannot":
            tokens += ["can", "not"]
        elif match := _CLITIC.search(word):
            tokens += [word[: match.start()], match.group(1)]
        else:
            tokens.append(word)
    return tokens


def document_frequencies(references: Iterable[Sequence[str]]) -> DocumentFrequencies:
    """Count n-grams (1 to 4) over the reference captions of a whole test set; an image without captions is no document.

    Bind the result to ``cider_d`` when a set is scored in parts; otherwise the scores depend on the parts.
    """
    counts: Counter[Ngram] = Counter()
    documents = 0
    for captions in references:
        if captions:
            counts.update({ngram for text in captions for ngram in _ngrams(caption_tokens(text))})
            documents += 1
    return DocumentFrequencies(counts, documents)


def cider_d(
    answers: Sequence[str], examples: Sequence[Example], *, frequencies: DocumentFrequencies | None = None
) -> Tensor:
    """CIDEr-D of each caption, ``[N]`` in [0, 10]: the released scorer's scale (papers print 100 times it, "130.0").

    ``frequencies`` defaults to those of the examples passed. nan where there are no references, and everywhere when
    the corpus has fewer than two images, as every inverse document frequency is then zero.
    Source: Vedantam et al. 2015, section 5 (CIDEr-D), n-grams 1 to 4 with equal weights, sigma 6.
    """
    corpus = frequencies or document_frequencies(example.references for example in examples)
    scores = [
        _score(answer, example.references, corpus) if example.references and corpus.documents > 1 else math.nan
        for answer, example in zip(answers, examples, strict=True)
    ]
    return torch.tensor(scores)


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def _weights(tokens: Sequence[str], corpus: DocumentFrequencies) -> list[dict[Ngram, float]]:
    """tf-idf vectors g^n of eq. 1, one for each n. Counts aren't divided by their sum, as in the released scorer."""
    vectors: list[dict[Ngram, float]] = [{}, {}, {}, {}]
    for ngram, count in _ngrams(tokens).items():
        idf = math.log(corpus.documents / max(1, corpus.counts.get(ngram, 0)))
        vectors[len(ngram) - 1][ngram] = count * idf
    return vectors


def _score(answer: str, references: Sequence[str], corpus: DocumentFrequencies) -> float:
    candidate = caption_tokens(answer)
    g_c = _weights(candidate, corpus)
    total = 0.0
    for text in references:
        reference = caption_tokens(text)
        g_s = _weights(reference, corpus)
        # The released scorer measures length in bigrams, so zero words are as long as one.
        gap = max(len(candidate), 1) - max(len(reference), 1)
        penalty = math.exp(-(gap**2) / (2 * 6.0**2))
        total += penalty * sum(_clipped_cosine(g_c[n], g_s[n]) for n in range(4)) / 4
    return 10 * total / len(references)


def _clipped_cosine(g_c: Mapping[Ngram, float], g_s: Mapping[Ngram, float]) -> float:
    """min(g_c, g_s) . g_s / (|g_c| |g_s|): repeating a word doesn't raise the score."""
    norm = math.hypot(*g_c.values()) * math.hypot(*g_s.values())
    return sum(min(w, g_s[k]) * g_s[k] for k, w in g_c.items() if k in g_s) / norm if norm else 0.0
