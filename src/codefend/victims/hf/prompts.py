"""The text of a question about one image: the model's own chat template, or its family's plain form."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

# For checkpoints that carry no chat template: the form their authors trained with. {image} is the placeholder token.
PLAIN = {
    "llava": "USER: {image}\n{prompt} ASSISTANT:",
    "llava_next": "USER: {image}\n{prompt} ASSISTANT:",
    "blip-2": "Question: {prompt} Answer:",  # the processor puts the query tokens in front itself
    "instructblip": "{prompt}",
    "paligemma": "{image}answer en {prompt}",
}


def question(processor: Any, kind: str, prompt: str) -> str:
    """The text for the processor, up to where the answer begins. ``kind`` is the config's ``model_type``."""
    if _template(processor):
        return _render(processor, [_user_turn(prompt)], open_answer=True)
    image = getattr(processor, "image_token", "")
    return PLAIN.get(kind, "{image}\n{prompt}\n").format(image=getattr(image, "content", image), prompt=prompt)


def answer_lead(processor: Any, kind: str, prompt: str, answer: str) -> str | None:
    """The text of the chat template between `question` and ``answer``: nothing or a space, as after "Assistant:".

    None without such a place: no template, none that takes answers, or an answer that opens in another way.
    """
    if not _template(processor):
        return None
    opening, whole = question(processor, kind, prompt), _render_answer(processor, prompt, answer)
    end = whole.find(answer, len(opening)) if whole.startswith(opening) else -1
    lead = whole[len(opening) : end]
    return None if end < 0 or lead.strip() else lead


def answer_end(processor: Any) -> list[int]:
    """The token that closes an answer: the one that ends a turn in the chat template, else the end of text."""
    tokenizer = processor.tokenizer
    if _template(processor):
        closing = _render_answer(processor, "a", "qzx").rpartition("qzx")[2]
        added = set(tokenizer.get_added_vocab().values())
        marks = [i for i in tokenizer(closing, add_special_tokens=False)["input_ids"] if i in added]
        if marks:
            return marks[:1]
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _template(processor: Any) -> str | None:
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _user_turn(prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}


def _render_answer(processor: Any, prompt: str, answer: str) -> str:
    """Question and answer as the chat template writes them; empty where it takes no answers."""
    parts = [{"type": "text", "text": answer}]
    for content in (parts, answer):  # some templates take an answer's parts, some plain text
        with suppress(Exception):  # jinja's errors or Python's own, depending on the template
            turns = [_user_turn(prompt), {"role": "assistant", "content": content}]
            whole = _render(processor, turns, open_answer=False)
            if repr(parts) not in whole:
                return whole
    return ""


def _render(processor: Any, turns: list[dict[str, Any]], *, open_answer: bool) -> str:
    tokenizer = processor.tokenizer
    text = tokenizer.apply_chat_template(
        turns, chat_template=_template(processor), tokenize=False, add_generation_prompt=open_answer
    )
    begins = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(text).removeprefix(tokenizer.bos_token) if begins else str(text)  # otherwise it would begin twice
