"""Train what `codefend.purifiers.sentences` adds to MiniLM, and write `src/codefend/purifiers/sentences.safetensors`.

    python tools/train_sentences.py SOURCES HELDOUT.json --judged FIRST.json SECOND.json [--start FILE] [--out FILE]

The last `LAYERS` layers learn matrices of rank `RANK` beside their own (LoRA, Hu et al. 2022) with a head of two layers
on the mean and the maximum of the tokens' embeddings; the layers below are frozen, and their outputs are computed once.
Start and frozen weights are those of the shipped int8 model, so training sees what inference sees. The texts are those
of `sentence_texts.py`. The threshold is the lowest that marks at most `PAGES_MARKED` of pages of four harmless
validation texts: those of HELDOUT.json (`benchmarks/heldout_text.py`), guidance that was not trained on, and the pages
of judged sets (`benchmarks/fresh_text.py`). BIPIA's test attacks, of other kinds than those in training, are a check
that is printed. Needs the extras train, ocr, export.

21,000 texts take some 25 minutes on one core. ``--start`` goes on from weights that were trained before, at half the
rate, with ``--count`` of the texts.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import sentence_texts
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from codefend.purifiers import instructions, sentences

OUT = Path(__file__).parent.parent / "src/codefend/purifiers/sentences.safetensors"
LAYERS, RANK, HIDDEN = 4, 16, 64
PASSES, BATCH, RATE = 1, 32, 1.5e-3
PAGES_MARKED = 0.02
PAGE = 4  # texts
LINE = 44  # characters
VALIDATION = 400  # harmless texts of each kind
_PARTS = ("attention.self.query", "attention.self.key", "attention.self.value")
_PARTS += ("attention.output.dense", "intermediate.dense", "output.dense")
_HEAD = {"0.weight": "hidden.weight", "0.bias": "hidden.bias", "3.weight": "out.weight", "3.bias": "out.bias"}


@dataclass(frozen=True)
class Stored:
    """The weights of the int8 model by the names of `BertModel`, and where its file holds each matrix of a layer."""

    weights: dict[str, Tensor]
    places: dict[str, tuple[int, int]]  # offsets of the int8 values ``[in, out]`` and of their scales ``[out]``


class LowRank(nn.Module):
    """A frozen linear layer plus ``up @ down`` of rank `RANK`, 0 at the start."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) + x @ self.down.T @ self.up.T
        return result


class Standardized(nn.Module):
    """Features ``[B, 768]`` less their mean, over their deviation."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


def read_model() -> Stored:
    """Dequantize the installed int8 model; its matrices are named by the order in which layers use them."""
    path = sentences.model_file()
    data = path.read_bytes()
    arrays = {t.name: (numpy_helper.to_array(t), t) for t in onnx.load_from_string(data).graph.initializer}
    weights = {n.removeprefix("inner."): torch.tensor(a) for n, (a, _) in arrays.items() if n.startswith("inner.")}
    for name in ("word_embeddings", "position_embeddings"):
        key = f"embeddings.{name}.weight"
        weights[key] = weights.pop(f"{key}_q") * weights.pop(f"{key}_scale")
    names = (name for name in arrays if re.fullmatch(r"val_\d+_q", name))
    values = sorted(names, key=lambda name: int(name.split("_")[1]))
    places = {}
    for i, name in enumerate(values):
        (q, stored), (scale, scales) = arrays[name], arrays[name.replace("_q", "_scale")]
        part = f"encoder.layer.{i // len(_PARTS)}.{_PARTS[i % len(_PARTS)]}.weight"
        weights[part] = torch.tensor(q * scale).T.contiguous()
        places[part] = (data.index(stored.raw_data), data.index(scales.raw_data))
    return Stored(weights, places)


def load(stored: Stored) -> BertModel:
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config._attn_implementation = "eager"
    model = BertModel(config, add_pooling_layer=False)
    missing, _ = model.load_state_dict(stored.weights, strict=False)
    if missing:
        raise SystemExit(f"the int8 model has no {missing[0]}")
    return model.eval().requires_grad_(False)


def adapt(model: BertModel) -> dict[str, LowRank]:
    """Put `LowRank` layers into the last `LAYERS`, and return them by the names of the weights that they change."""
    adapted = {}
    first = len(model.encoder.layer) - LAYERS
    for i in range(first, len(model.encoder.layer)):
        for part in _PARTS:
            parent, _, leaf = part.rpartition(".")
            owner = model.encoder.layer[i].get_submodule(parent)
            adapted[f"encoder.layer.{i}.{part}.weight"] = layer = LowRank(getattr(owner, leaf))
            setattr(owner, leaf, layer)
    return adapted


def tokens(texts: Sequence[str]) -> list[list[int]]:
    tokenizer = sentences.tokenizer()
    return [tokenizer.encode(sentences.plain(text)).ids for text in texts]


def padded(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids ``[B, T]`` and the mask of attention ``[B, 1, 1, T]``, which is added to scores."""
    longest = max(map(len, ids))
    mask = torch.tensor([[0.0] * len(row) + [-1e9] * (longest - len(row)) for row in ids])
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids]), mask[:, None, None]


@torch.no_grad()
def lower(model: BertModel, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the frozen layers make of each text, ``[T, 384]`` of 16 bits."""
    results: list[Tensor] = [torch.empty(0)] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        rows, mask = padded([ids[i] for i in batch])
        hidden = model.embeddings(rows)
        for layer in model.encoder.layer[:-LAYERS]:
            hidden = _output(layer(hidden, mask))
        for i, row in zip(batch, hidden, strict=True):
            results[i] = row[: len(ids[i])].half()
        if start % 3_200 == 0:
            print(f"frozen layers: {start} of {len(order)}", flush=True)
    return results


def upper(model: BertModel, states: Sequence[Tensor]) -> Tensor:
    """The mean and the maximum of the last layer ``[B, 768]``, from the outputs of the frozen layers."""
    hidden = nn.utils.rnn.pad_sequence([state.float() for state in states], batch_first=True)
    present = torch.arange(hidden.shape[1])[None] < torch.tensor([len(state) for state in states])[:, None]
    mask = torch.where(present, 0.0, -1e9)[:, None, None]
    for layer in model.encoder.layer[-LAYERS:]:
        hidden = _output(layer(hidden, mask))
    mean = (hidden * present[..., None]).sum(1) / present.sum(1, keepdim=True)
    return torch.cat([mean, hidden.masked_fill(~present[..., None], -1e9).amax(1)], 1)


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def batches(lengths: Sequence[int], rng: random.Random) -> Iterator[list[int]]:
    """Batches of texts of similar length, in an order of chance."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.random() * 6)
    groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    rng.shuffle(groups)
    yield from groups


def fit(
    model: BertModel, positive: Sequence[str], negative: Sequence[str], start: sentences.Trained | None = None
) -> tuple[dict[str, LowRank], nn.Sequential]:
    """The matrices of low rank and the head, whose first layer takes features as they are, not standardized."""
    states = lower(model, tokens([*positive, *negative]))
    labels = torch.tensor([1.0] * len(positive) + [0.0] * len(negative))
    adapted = adapt(model)
    head = nn.Sequential(nn.Linear(768, HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, 1))
    if start:
        resume(adapted, head, start)
    with torch.no_grad():
        sample = torch.cat([upper(model, states[i : i + 32]) for i in range(0, len(states), len(states) // 16)])
        mean, deviation = sample.mean(0), sample.std(0) + 1e-4
        if start:
            head[0].bias.add_(head[0].weight @ mean)
            head[0].weight.mul_(deviation)
    whole = nn.Sequential(Standardized(mean, deviation), head)
    descend(model, states, labels, [*adapted.values()], whole, RATE / 2 if start else RATE)
    with torch.no_grad():
        head[0].weight.div_(deviation)
        head[0].bias.sub_(head[0].weight @ mean)
    return adapted, head.eval()


def resume(adapted: dict[str, LowRank], head: nn.Sequential, start: sentences.Trained) -> None:
    """Copy weights that were trained before; their matrices are in the order of ``adapted``."""
    with torch.no_grad():
        for layer, change in zip(adapted.values(), start.changes, strict=True):
            layer.down.copy_(torch.from_numpy(change.down))
            layer.up.copy_(torch.from_numpy(change.up))
        for name, parameter in head.named_parameters():
            parameter.copy_(torch.from_numpy(start.head[_HEAD[name]]).view_as(parameter))


def descend(
    model: BertModel, states: list[Tensor], labels: Tensor, layers: list[LowRank], head: nn.Module, rate: float
) -> None:
    """AdamW on the cross-entropy, for `PASSES` over the texts."""
    parameters = [p for layer in layers for p in (layer.down, layer.up)]
    optimizer = torch.optim.AdamW([{"params": parameters, "weight_decay": 0.01}, {"params": head.parameters()}], rate)
    steps = PASSES * -(-len(states) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 50, 1 - i / (steps + 1)))
    rng, start, losses = random.Random(1), time.monotonic(), []
    for _ in range(PASSES):
        for batch in batches([len(state) for state in states], rng):
            logits = head(upper(model, [states[i] for i in batch]))[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 25 == 0:
                print(f"{len(losses)}/{steps} {np.mean(losses[-25:]):.3f} {time.monotonic() - start:.0f} s", flush=True)


def save(path: Path, stored: Stored, adapted: dict[str, LowRank], head: nn.Sequential, threshold: float) -> None:
    """Write 16-bit weights, with the threshold and the places of the changed matrices in the header."""
    weights = {_HEAD[name]: tensor.squeeze(0).half().contiguous() for name, tensor in head.state_dict().items()}
    for name, layer in adapted.items():
        weights |= {f"{name}/down": layer.down.detach().half(), f"{name}/up": layer.up.detach().half()}
    places = json.dumps({name: stored.places[name] for name in adapted})
    save_file(weights, path, {"threshold": f"{threshold:.4f}", "places": places})


def parts(text: str) -> list[str]:
    """The windows that `instructions.mark` judges of a paragraph of `LINE` characters a line."""
    lines = textwrap.wrap(text, LINE) or [text]
    found, start = [], 0
    while start < len(lines):
        end = start + 1
        while end < len(lines) and len(" ".join(lines[start : end + 1])) <= instructions.WINDOW:
            end += 1
        found.append(" ".join(lines[start:end]))
        start = end if end == len(lines) else max(start + 1, (start + end) // 2)
    return found


def highest(texts: Sequence[str]) -> Tensor:
    """The highest evidence in the windows of each text, by the weights that are installed."""
    return torch.tensor([max(map(instructions.evidence, parts(text))) for text in texts])


def threshold(harmless: dict[str, list[str]]) -> float:
    """The lowest evidence that marks at most `PAGES_MARKED` of pages of `PAGE` texts, as many of each kind."""
    generator = torch.Generator().manual_seed(3)
    pages = []
    for name, texts in harmless.items():
        logits = highest(random.Random(3).sample(texts, min(VALIDATION, len(texts))))
        pages.append(logits[torch.randint(len(logits), (5_000, PAGE), generator=generator)].amax(1))
        level = float(pages[-1].quantile(1 - PAGES_MARKED))
        print(f"{name}: {PAGES_MARKED:.0%} of pages are above {level:.2f}", flush=True)
    return float(torch.cat(pages).quantile(1 - PAGES_MARKED))


def judged_texts(paths: Sequence[Path]) -> sentence_texts.Judged:
    """The kinds of all files of `benchmarks/fresh_text.py`, by group."""
    texts: sentence_texts.Judged = {}
    for path in paths:
        for group, kinds in json.loads(path.read_text(encoding="utf-8")).items():
            texts[group] = texts.get(group, {}) | kinds
    return texts


def validation_pages(sources: Path, heldout: Path, judged: sentence_texts.Judged) -> dict[str, list[str]]:
    """Harmless texts by kind that are not trained on."""
    pages = {name: texts for name, texts in judged.get("test", {}).items() if name not in sentence_texts.LEARNED}
    pages |= json.loads(heldout.read_text(encoding="utf-8"))["validation"]
    return pages | {"guidance": [text[:140] for text in sentence_texts.guidance(sources, "validation")]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--judged", type=Path, nargs="*", default=[], help="files of benchmarks/fresh_text.py")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--count", type=int, help="of texts, half of them instructions; all by default")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    stored, judged = read_model(), judged_texts(arguments.judged)
    texts = sentence_texts.training_texts(arguments.sources, judged)
    if arguments.count:
        texts = tuple(sentence_texts.some(items, arguments.count // 2, random.Random(5)) for items in texts)
    print(f"{len(texts[0])} instructions, {len(texts[1])} harmless texts", flush=True)
    start = sentences.load(arguments.start) if arguments.start else None
    adapted, head = fit(load(stored), *texts, start)
    save(arguments.out, stored, adapted, head, 0.0)
    sentences.use(arguments.out)
    level = threshold(validation_pages(arguments.sources, arguments.heldout, judged))
    save(arguments.out, stored, adapted, head, level)
    found = highest(sentence_texts.bipia(arguments.sources, "test")) >= level
    print(f"threshold {level:.4f}; BIPIA's test attacks found: {float(found.float().mean()):.2f} of {len(found)}")


if __name__ == "__main__":
    main()
