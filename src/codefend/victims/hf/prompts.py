"""How a question about one picture is written for a model: its own chat template, or its family's plain form."""

from __future__ import annotations

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
    tokenizer = processor.tokenizer
    if _template(processor):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = _render(processor, [turn], open_answer=True)
        begins = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if begins else text  # or it would begin twice
    image = getattr(processor, "image_token", "")
    return PLAIN.get(kind, "{image}\n{prompt}\n").format(image=getattr(image, "content", image), prompt=prompt)


def answer_end(processor: Any) -> list[int]:
    """The token that closes an answer: the one that ends a turn in the chat template, else the end of text."""
    tokenizer = processor.tokenizer
    if _template(processor):
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "a"), ("assistant", "qzx"))
        ]
        closing = _render(processor, turns, open_answer=False).rpartition("qzx")[2]
        added = set(tokenizer.get_added_vocab().values())
        marks = [i for i in tokenizer(closing, add_special_tokens=False)["input_ids"] if i in added]
        if marks:
            return marks[:1]
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _template(processor: Any) -> str | None:
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _render(processor: Any, turns: list[dict[str, Any]], *, open_answer: bool) -> str:
    text = processor.tokenizer.apply_chat_template(
        turns, chat_template=_template(processor), tokenize=False, add_generation_prompt=open_answer
    )
    return str(text)
