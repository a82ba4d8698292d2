"""The answer normalization of the VQA challenge (Antol et al. 2015; Goyal et al. 2017), written from its rules."""

from __future__ import annotations

import re

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


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, number words as digits ("none" is 0), apostrophes restored.

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
