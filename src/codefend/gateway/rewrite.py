"""The same request with other images and the prompt policy applied. Pure functions on parsed JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from codefend.gateway.documents import page_parts
from codefend.gateway.errors import Api
from codefend.gateway.shapes import TURN_TEXT, Slot, Survey
from codefend.gateway.suspicion import Place
from codefend.prompts.image_text import system_text


@dataclass(frozen=True)
class EncodedImage:
    """An image file as base64."""

    media_type: str
    data: str


class PromptWrapper(Protocol):
    """The part of ``codefend.prompts.PromptPolicy`` that is needed here."""

    @property
    def system(self) -> str: ...
    def around(self, prompt: str) -> tuple[str, str]: ...


@dataclass(frozen=True)
class _Noted:
    """A policy, or none, with a note behind the text."""

    policy: PromptWrapper | None
    note: str

    def around(self, prompt: str) -> tuple[str, str]:
        before, after = ("", "") if self.policy is None else self.policy.around(prompt)
        return before, after + self.note


def rebuild(
    body: Any,
    slots: Survey,
    images: Sequence[EncodedImage],
    *,
    policy: PromptWrapper | None = None,
    everywhere: bool = False,
    notes: Sequence[str] = (),
) -> Any:
    """Return the body with each slot's image replaced and the prompt policy applied; ``body`` itself is unchanged.

    ``notes``, one for each slot or none at all, stand behind the text of the message that holds the image; those of
    images elsewhere, as in results of tools, behind the system text.

    The policy wraps the user's messages that hold an image, or with ``everywhere`` all of them; the same message is
    wrapped alike in every later request of a conversation, so that an upstream's prefix cache still matches.
    """
    body = _with_images(body, slots, images)
    noted: dict[Place, str] = {}
    for slot, text in zip(slots.slots, notes, strict=False):
        if text:
            noted[slot.place] = noted.get(slot.place, "") + text  # pages of a document share their place
    if policy is None and not noted:
        return body
    turns = [turn for turn in slots.turns if everywhere or turn.has_image]
    for turn in turns:
        inside = [place for place in noted if place[: len(turn.place)] == turn.place]
        around = _Noted(policy, "".join(noted.pop(place) for place in inside))
        body = _replace(body, turn.place, _wrap(_get(body, turn.place), around, TURN_TEXT[slots.api]))
    system = [policy.system] if policy is not None and (turns or slots.slots) else []
    system += [system_text()] if any(notes) else []
    text = "\n\n".join(filter(None, system)) + "".join(noted.values())
    return _SYSTEM[slots.api](body, text) if text else body


def _with_images(body: Any, slots: Survey, images: Sequence[EncodedImage]) -> Any:
    pages: dict[Place, list[tuple[str, str]]] = {}
    for slot, image in zip(slots.slots, images, strict=True):
        if slot.form == "page":
            pages.setdefault(slot.place, []).append((image.media_type, image.data))
        else:
            body = _replace(body, slot.place, _slot_value(slot, image))
    for place, files in reversed(pages.items()):  # from the end, so that places before stay valid
        parts, index = _get(body, place[:-1]), int(place[-1])
        document = page_parts(slots.api, parts[index], files)
        body = _replace(body, place[:-1], [*parts[:index], *document, *parts[index + 1 :]])
    return body


def splice(raw: bytes, tokens: Sequence[str], images: Sequence[EncodedImage]) -> bytes:
    """Put base64 where its token stands. A JSON encoder would look at every character of it, on the event loop."""
    places = [(raw.index(token.encode()), len(token), image.data) for token, image in zip(tokens, images, strict=True)]
    pieces, end = [], 0
    for start, length, data in sorted(places):
        pieces += [raw[end:start], data.encode("ascii")]
        end = start + length
    return b"".join([*pieces, raw[end:]])


def _slot_value(slot: Slot, image: EncodedImage) -> Any:
    if slot.form == "source":
        return {"type": "base64", "media_type": image.media_type, "data": image.data}
    return image.data if slot.form == "base64" else f"data:{image.media_type};base64,{image.data}"


def _get(body: Any, place: Place) -> Any:
    for step in place:
        body = body[step]
    return body


def _replace(body: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    copy = body.copy()  # only the containers on the way are copied
    copy[place[0]] = _replace(body[place[0]], place[1:], value)
    return copy


def _wrap(content: Any, policy: _Noted, kind: str) -> Any:
    if isinstance(content, str):
        return content.join(policy.around(content))
    texts = [i for i, part in enumerate(content) if part["type"] == kind]
    before, after = policy.around("\n".join(content[i]["text"] for i in texts))
    if not texts:
        return [*content, {"type": kind, "text": before + after}] if before + after else content
    parts = list(content)
    parts[texts[0]] = parts[texts[0]] | {"text": before + parts[texts[0]]["text"]}
    parts[texts[-1]] = parts[texts[-1]] | {"text": parts[texts[-1]]["text"] + after}
    return parts


def _chat_system(body: dict[str, Any], text: str) -> dict[str, Any]:
    messages = list(body["messages"])
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), (str, list)):
        messages[0] = first | {"content": _join(text, first["content"], "text")}
    else:
        messages.insert(0, {"role": "system", "content": text})
    return body | {"messages": messages}


def _join(text: str, content: Any, kind: str) -> Any:
    if content is None:
        return text
    return f"{text}\n\n{content}" if isinstance(content, str) else [{"type": kind, "text": text}, *content]


_SYSTEM: dict[Api, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "chat": _chat_system,
    "responses": lambda body, text: body | {"instructions": _join(text, body.get("instructions"), "input_text")},
    "messages": lambda body, text: body | {"system": _join(text, body.get("system"), "text")},
}
