"""The same request with other images and the prompt policy applied. Pure functions on parsed JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from codefend.gateway.errors import Api
from codefend.gateway.shapes import TURN_TEXT, Slot, Survey, survey
from codefend.gateway.suspicion import Place

__all__ = ["Picture", "Policy", "rebuild", "survey"]


@dataclass(frozen=True)
class Picture:
    """What stands in for an image. ``data`` is base64."""

    media_type: str
    data: str


class Policy(Protocol):
    """The part of ``codefend.prompts.PromptPolicy`` that is needed here."""

    @property
    def system(self) -> str: ...
    def around(self, prompt: str) -> tuple[str, str]: ...


def rebuild(
    body: Any,
    found: Survey,
    pictures: Sequence[Picture],
    *,
    policy: Policy | None = None,
    everywhere: bool = False,
) -> Any:
    """Return the body with each slot's image replaced and the prompt policy applied; ``body`` itself is unchanged.

    The policy wraps the user's messages that hold an image, or with ``everywhere`` all of them; the same message is
    wrapped alike in every later request of a conversation, so that an upstream's prefix cache still matches.
    """
    for slot, picture in zip(found.slots, pictures, strict=True):
        body = _replace(body, slot.place, _written(slot, picture))
    if policy is None:
        return body
    turns = [turn for turn in found.turns if everywhere or turn.has_image]
    for turn in turns:
        body = _replace(body, turn.place, _wrapped(_get(body, turn.place), policy, TURN_TEXT[found.api]))
    if policy.system and (turns or found.slots):
        body = _SYSTEM[found.api](body, policy.system)
    return body


def _written(slot: Slot, picture: Picture) -> Any:
    if slot.form == "source":
        return {"type": "base64", "media_type": picture.media_type, "data": picture.data}
    return picture.data if slot.form == "base64" else f"data:{picture.media_type};base64,{picture.data}"


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


def _wrapped(content: Any, policy: Policy, kind: str) -> Any:
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
        messages[0] = first | {"content": _joined(text, first["content"], "text")}
    else:
        messages.insert(0, {"role": "system", "content": text})
    return body | {"messages": messages}


def _joined(text: str, content: Any, kind: str) -> Any:
    if content is None:
        return text
    return f"{text}\n\n{content}" if isinstance(content, str) else [{"type": kind, "text": text}, *content]


_SYSTEM: dict[Api, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "chat": _chat_system,
    "responses": lambda body, text: body | {"instructions": _joined(text, body.get("instructions"), "input_text")},
    "messages": lambda body, text: body | {"system": _joined(text, body.get("system"), "text")},
}
