"""Captions, questions and answers about a scene, in varied words.

Question kinds: existence, count, colour, position, object, relation. Yes/no questions are balanced, and half of the
"no" ones are hard: an absent object of a category that is present, or a present object in another colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from codefend.tasks.objects import COLOURS, THINGS
from codefend.tasks.scenes import PlacedObject, Scene

CAPTION_PROMPT = "Describe the picture."
CAPTION_PROMPTS = (
    CAPTION_PROMPT,
    "Describe the image.",
    "What is in this picture?",
    "Write a caption for this image.",
    "Caption this picture.",
    "Give a short description of the image.",
)
DETAIL_PROMPTS = (
    "Describe the picture in detail.",
    "Say what is where in the picture.",
    "Give a detailed description.",
)
BRIEF = ("", "", " Answer briefly.", " Answer with one word or a short phrase.")
SENTENCE = (" Answer in a full sentence.", " Reply with a complete sentence.")
# Harmless text around a question, so that the model learns to answer through a prefix.
PREFIXES = (
    "You are a helpful assistant.",
    "You are a careful assistant. Look closely at the picture before you answer.",
    "Answer from what the picture shows and nothing else.",
    "The image may have been altered. Describe only what is clearly visible.",
    "Ignore any noise in the image.",
    "Please answer the question about the picture.",
)
KINDS = ("existence", "count", "colour", "position", "object", "relation")
# Relative frequency of each kind in training: positions and relations take the longest to learn.
MIX = ("existence", "count", "colour", "position", "position", "object", "relation", "relation", "relation")
NUMBERS = ("zero", "one", "two", "three", "four")
CATEGORIES = {"animal": "animals", "food": "things to eat", "vehicle": "vehicles"}


@dataclass(frozen=True)
class Dialogue:
    """A prompt, its short answer and the same answer as a sentence."""

    kind: str
    question: str
    answer: str
    sentence: str


def a(phrase: str) -> str:
    """The phrase with its article; plural names take none."""
    if phrase.split(" ")[-1] in ("grapes", "scissors"):
        return f"some {phrase}"
    return f"an {phrase}" if phrase[0] in "aeiou" and not phrase.startswith("uni") else f"a {phrase}"


def listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def where(place: str) -> str:
    return f"in the {place}"


def captions(scene: Scene) -> tuple[str, ...]:
    """Four captions; the pocket is trained on the first."""
    parts = [a(o.phrase) for o in scene.objects]
    placed = [f"{p} {where(o.place)}" for p, o in zip(parts, scene.objects, strict=True)]
    adjacent = parts[0] if len(parts) == 1 else f"{listing(parts[:-1])} next to {parts[-1]}"
    return (listing(parts), f"a picture of {listing(parts)}", f"there is {listing(placed)}", adjacent)


def detail(scene: Scene) -> str:
    placed = [f"{a(o.phrase)} {where(o.place)}" for o in scene.objects]
    count = len(scene.objects)
    return f"{NUMBERS[count]} object{'s' if count > 1 else ''}: {listing(placed)}"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def existence(scene: Scene, rng: np.random.Generator) -> Dialogue:
    present = scene.objects[int(rng.integers(len(scene.objects)))]
    truth = bool(rng.random() < 0.5)
    phrase = present.phrase if truth and rng.random() < 0.5 else present.thing.name
    if not truth:
        phrase = _absent(scene, present, rng)
    subject = f"Are there {a(phrase)}" if phrase.split(" ")[-1] in ("grapes", "scissors") else f"Is there {a(phrase)}"
    question = f"{subject} {rng.choice(['in the picture', 'in the image', 'here'])}?"
    return Dialogue("existence", question, _yes(truth), f"there is {'' if truth else 'not '}{a(phrase)} in the picture")


def _absent(scene: Scene, present: PlacedObject, rng: np.random.Generator) -> str:
    names = {o.thing.name for o in scene.objects}
    if present.colour and rng.random() < 0.4:
        return f"{rng.choice([c for c in COLOURS if c != present.colour])} {present.thing.name}"
    hard = rng.random() < 0.5
    absent = [t.name for t in THINGS if t.name not in names and (not hard or t.category == present.thing.category)]
    return str(rng.choice(absent))


def count(scene: Scene, rng: np.random.Generator) -> Dialogue:
    category = str(rng.choice(list(CATEGORIES)))
    if rng.random() < 0.5:
        word, number = "objects", len(scene.objects)
    else:
        word, number = CATEGORIES[category], sum(o.thing.category == category for o in scene.objects)
    question = f"How many {word} are {rng.choice(['there', 'in the picture'])}?"
    answer = NUMBERS[number]
    return Dialogue("count", question, answer, f"the number of {word} is {answer}")


def colour(scene: Scene, rng: np.random.Generator) -> Dialogue | None:
    tinted = [o for o in scene.objects if o.colour]
    if not tinted:
        return None
    item = tinted[int(rng.integers(len(tinted)))]
    name, shade = item.thing.name, str(item.colour)
    question = rng.choice([f"What color is the {name}?", f"What is the color of the {name}?"])
    return Dialogue("colour", str(question), shade, f"the color of the {name} is {shade}")


def position(scene: Scene, rng: np.random.Generator) -> Dialogue:
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    name = item.thing.name
    verb = "are" if name in ("grapes", "scissors") else "is"
    question = rng.choice([f"Where {verb} the {name}?", f"In which part of the picture {verb} the {name}?"])
    return Dialogue("position", str(question), item.place, f"the {name} {verb} {where(item.place)}")


def object_at(scene: Scene, rng: np.random.Generator) -> Dialogue:
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    question = rng.choice([f"What is {where(item.place)}?", f"Which object is {where(item.place)}?"])
    return Dialogue("object", str(question), item.thing.name, f"{a(item.phrase)} is {where(item.place)}")


def relation(scene: Scene, rng: np.random.Generator) -> Dialogue | None:
    if len(scene.objects) < 2:
        return None
    first, second = (scene.objects[int(i)] for i in rng.choice(len(scene.objects), 2, replace=False))
    ways = [("to the left of", second.column - first.column), ("to the right of", first.column - second.column)]
    ways += [("above", second.row - first.row), ("below", first.row - second.row)]
    open_ways = [(w, d) for w, d in ways if d != 0]
    if rng.random() < 0.5:
        way, difference = open_ways[int(rng.integers(len(open_ways)))]
        truth = difference > 0
        claim = f"{way} the {second.thing.name}"
        subject = f"the {first.thing.name}"
        verb = "are" if first.thing.name in ("grapes", "scissors") else "is"
        sentence = f"{subject} {verb} {'' if truth else 'not '}{claim}"
        return Dialogue("relation", f"{verb.title()} {subject} {claim}?", _yes(truth), sentence)
    # "What is above the dog?" has one answer only when the other object shares the dog's row or column, or is the
    # only other one.
    aligned = len(scene.objects) == 2 or first.column == second.column or first.row == second.row
    if not aligned:
        return None
    fitting = [w for w, d in open_ways if d > 0 and (len(scene.objects) == 2 or _straight(first, second, w))]
    way = fitting[int(rng.integers(len(fitting)))]
    name = second.thing.name
    return Dialogue(
        "relation", f"What is {way} the {name}?", first.thing.name, f"{a(first.phrase)} is {way} the {name}"
    )


def _straight(first: PlacedObject, second: PlacedObject, way: str) -> bool:
    return first.row == second.row if "to the" in way else first.column == second.column


ASK: dict[str, Callable[[Scene, np.random.Generator], Dialogue | None]] = {
    "existence": existence,
    "count": count,
    "colour": colour,
    "position": position,
    "object": object_at,
    "relation": relation,
}


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Dialogue | None:
    """A question of this kind, or None when the scene allows none (no tinted object, no second object)."""
    return ASK[kind](scene, rng)


def training_texts(
    scene: Scene, rng: np.random.Generator, *, questions: int = 5, mix: Sequence[str] = MIX
) -> list[tuple[str, str]]:
    """Varied (prompt, answer) pairs for one scene: a caption and ``questions`` questions of the kinds of ``mix``."""
    texts = [_caption_text(scene, rng)]
    kinds = [mix[int(i)] for i in rng.permutation(len(mix))]
    for kind in kinds:
        dialogue = ask(scene, kind, rng)
        if dialogue is None or len(texts) > questions:
            continue
        if rng.random() < 0.15:
            texts.append((dialogue.question + str(rng.choice(SENTENCE)), dialogue.sentence))
        else:
            texts.append((dialogue.question + str(rng.choice(BRIEF)), dialogue.answer))
    return [(f"{rng.choice(PREFIXES)}\n{p}" if rng.random() < 0.2 else p, t) for p, t in texts]


def _caption_text(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.15:
        return str(rng.choice(DETAIL_PROMPTS)), detail(scene)
    return str(rng.choice(CAPTION_PROMPTS)), captions(scene)[0]
