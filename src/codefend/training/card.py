"""The description of trained weights: ``training.json`` (config, data, curve) and a model card, ``README.md``.

Both are views of the training run, rewritten whenever the weights are saved. Results come from an evaluation, and
`codefend card` adds them.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from codefend.bench.results import eps_label, summarize
from codefend.core.files import write_atomic
from codefend.core.runs import Row, read_config, read_rows
from codefend.training import pair_tables
from codefend.types import CodefendError

TRAINING_FILE, CARD_FILE = "training.json", "README.md"
POINTS = 40  # of the curve in training.json; the run folder's rows.jsonl has every step

SUMMARIES = {
    "pocket": "Pocket victim: connector and LoRA adapters between an EfficientNet-Lite and SmolLM2-135M-Instruct.",
    "pocket-photographs": "Vision tokens with which the pocket victim names the ImageNet class of a photograph.",
    "smolvlm-pocket": (
        "Victim with SmolVLM's architecture at pocket size: ViT with 16-pixel patches, connector and LoRA adapters, "
        "around SmolLM2-135M-Instruct. `codefend build-victim smolvlm-pocket -o DIR` writes the complete checkpoint."
    ),
    "fare": "Pocket victim whose image encoder was fine-tuned adversarially (FARE, Schlarmann 2024, arXiv 2402.12336).",
    "tecoa": "Pocket victim with an encoder fine-tuned adversarially, words as labels (TeCoA-style, arXiv 2212.07016).",
    "encoder": "Image encoder for trainings and evaluations, distilled from EfficientNet-Lite features; no classes.",
    "prior": "Unconditional diffusion prior in EDM form; `diffpure` uses it, and the other purifiers start from it.",
    "bridge": "Purifier from adversarial to clean: a supervised diffusion bridge, one to four evaluations.",
    "hgd": "Purifier, a peer: HGD (Liao et al. 2018, arXiv 1712.02976), re-implemented on the project's network.",
    "flowpure": "Purifier, a peer: FlowPure-PGD (Collaert et al. 2025, arXiv 2505.13280), re-implemented.",
    "flowpure-gauss": "Purifier, a peer: FlowPure-Gauss (Collaert et al. 2025, arXiv 2505.13280), re-implemented.",
    "adbm": "Purifier, a peer: ADBM (Li et al. 2025, arXiv 2408.00315), re-implemented on the project's network.",
    "hf-bridge": "Purifier: a pixel diffusion model of diffusers, fine-tuned as a bridge from adversarial to clean.",
    "latent": "Purifier: Stable Diffusion with LoRA, fine-tuned on pairs in latents (CoDefend, arXiv 2510.11096).",
    "codefend-r": "Purifier, a peer: our reconstruction of CoDefend (Zhu et al. 2025, arXiv 2510.11096), in pixels.",
}
BACKBONES = ("hf-bridge", "latent")  # fine-tuned from diffusers models
IMAGES = (
    "composed scenes (Fluent Emoji, MIT; backgrounds procedural or from scikit-image), scikit-image's photographs "
    "(public domain or CC0; astronaut, chelsea, coffee and rocket are held out), scikit-learn's two photographs "
    "(CC-BY), dead leaves (procedural)"
)
SCENES = (
    "composed scenes (Fluent Emoji, MIT; backgrounds procedural or from scikit-image, public domain or CC0), "
    "easy-vqa's training split (MIT)"
)


def write_card(folder: str | Path, kind: str) -> None:
    """Write both files into the ``weights`` of a run folder. Raises CodefendError when they cannot be written."""
    rows, config = read_rows(folder), read_config(folder)
    banks = [{**_bank(bank), "times": times} for bank, times in Counter[str](config.get("pairs", ())).items()]
    training = {
        "kind": kind,
        "config": config,
        "steps": max((row["step"] for row in rows if "step" in row), default=0),
        "hours": sum(row.get("seconds", 0.0) for row in rows) / 3600,
        "pairs": banks,
        "curve": curve(rows),
    }
    _write(Path(folder) / "weights", training)


def refresh(folder: str | Path) -> Path:
    """Rewrite the card from the folder's training.json and return its path. Raises CodefendError when there is none."""
    path = Path(folder) / TRAINING_FILE
    try:
        _write(Path(folder), json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise CodefendError(f"{folder} has no readable {TRAINING_FILE} ({error}): a training writes it") from error
    return Path(folder) / CARD_FILE


def _write(folder: Path, training: Mapping[str, Any]) -> None:
    portable = _strip_paths(training)
    write_atomic(folder / TRAINING_FILE, json.dumps(portable, indent=1) + "\n")
    write_atomic(folder / CARD_FILE, _text(portable))


def _strip_paths(value: Any) -> Any:
    """The value with every absolute path cut to its last two names: no folders of this machine."""
    if isinstance(value, Mapping):
        return {key: _strip_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strip_paths(item) for item in value]
    return "/".join(Path(value).parts[-2:]) if isinstance(value, str) and Path(value).is_absolute() else value


def _bank(folder: str) -> Row:
    """A bank of pairs: its config, and the number of pairs of each kind, target, steps and range of eps."""
    groups: dict[tuple[str, str, int | None], list[float]] = defaultdict(list)
    table = not (Path(folder) / "rows.jsonl").is_file()  # or shards alone, of which nothing is known
    if table and any(Path(folder).glob("*.parquet")):
        for kind, target, steps, eps in pair_tables.read_descriptions(folder):
            groups[kind, target, steps].append(eps)
    elif not table:
        for row in read_rows(folder):
            groups[row["kind"], row["target"], row.get("steps")] += [pair["eps"] for pair in row["pairs"]]
    pairs = [
        {"kind": kind, "target": target, "steps": steps, "pairs": len(eps), "eps": [min(eps), max(eps)]}
        for (kind, target, steps), eps in sorted(groups.items(), key=str)
    ]
    return {"config": {"table": Path(folder).name} if table else read_config(folder), "made": pairs}


def curve(rows: Sequence[Row], points: int = POINTS) -> list[Row]:
    """The numbers of the steps' rows, averaged over at most ``points`` intervals of equal length."""
    steps = [row for row in rows if "step" in row]
    size = max(1, -(-len(steps) // points))
    intervals = []
    for start in range(0, len(steps), size):
        part = steps[start : start + size]
        names = {name: None for row in part for name, value in row.items() if isinstance(value, float)}
        means = {name: fmean(row[name] for row in part if isinstance(row.get(name), float)) for name in names}
        intervals.append({"step": part[-1]["step"], **{name: round(value, 6) for name, value in means.items()}})
    return intervals


def _text(training: Mapping[str, Any]) -> str:
    kind, config, steps = training["kind"], training["config"], training["steps"]
    lines = [f"# {kind}", "", SUMMARIES[kind], ""]
    lines += [f"- Training: {steps} of {config.get('steps', steps)} steps"]
    lines[-1] += f" after {config['distill_steps']} of distillation" if "distill_steps" in config else ""
    lines[-1] += f", {training['hours']:.1f} hours in them; {_settings(config)}."
    attacks = [_attacks(bank) for bank in training["pairs"]]
    if config.get("mined") or config.get("replay", 1) > 1 or kind in ("adbm", "fare", "tecoa"):
        attacks.append(_mined(kind, config))
    if config.get("train") == "robust":
        attacks.append(_in_loop(config))
    if config.get("train") in ("bridge", "robust", "peer", "fare", "tecoa", *BACKBONES):
        lines += [f"- Attacks seen in training: {'; '.join(attacks) or 'none'}."]
    if config.get("without"):
        lines += [f"- Left out of the banks: {', '.join(config['without'])}."]
    encoders = config.get("encoders") or ([config["encoder"]] if "encoder" in config else [])
    if encoders := [*encoders, *config.get("zoo", ())]:
        lines += [f"- Encoders that guide: {', '.join(encoders)}; no other was used outside the banks."]
    if kind in BACKBONES:
        lines += [f"- Weights: fine-tuned from {config['model']}, whose licence holds for them as well; float32."]
        lines += ["- Data: that model's, and the images of the banks. Curve, settings and banks: training.json.", ""]
        return "\n".join(lines)
    lines += [f"- Data: {SCENES if kind in ('pocket', 'smolvlm-pocket') else IMAGES}."]
    lines += ["- Weights: Apache-2.0 as the code; float16. Curve, settings and banks: training.json.", ""]
    return "\n".join(lines)


def _settings(config: Mapping[str, Any]) -> str:
    """The scalar settings, as ``--set`` takes them."""
    scalars = {
        k: v for k, v in config.items() if isinstance(v, int | float | str) and v != "" and k not in ("train", "steps")
    }
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in scalars.items())


def _attacks(bank: Row) -> str:
    if not bank["made"]:
        return "pairs without a description"
    by_steps: dict[int | None, list[str]] = defaultdict(list)
    for group in bank["made"]:
        low, high = (255 * eps for eps in group["eps"])
        pairs = f"{group['kind']} on {group['target']} ({group['pairs']} pairs, {low:.1f} to {high:.1f}/255)"
        by_steps[_steps(bank["config"], group)].append(pairs)
    often = f", drawn {bank['times']} times as often" if bank["times"] > 1 else ""
    attacks = (f"PGD{'' if steps is None else f'-{steps}'} on {', '.join(pairs)}" for steps, pairs in by_steps.items())
    return f"{' and '.join(attacks)}{often}"


def _steps(config: Mapping[str, Any], group: Row) -> int | None:
    """The attack's steps: of the group or, in an older card, of its bank."""
    setting = "answer_steps" if group["kind"] == "answers" else "steps"
    steps: int | None = group.get("steps") or config.get(setting)
    return steps


def _in_loop(config: Mapping[str, Any]) -> str:
    """The attacks of `training.robust`, all in the loop."""
    low, high = 255 * config["min_eps"], 255 * config["max_eps"]
    steps = config.get("adaptive_steps", 1)
    attack = f"PGD-{steps}" if steps > 1 else "N-FGSM"
    on = "features, words and the language-model loss" if config.get("answers") else "features and words"
    return (
        f"in the loop, at {low:g} to {high:g}/255: {attack} through the purifier on {on}, "
        f"PGD-{config['bare_steps']} on bare encoders' features; random warps, fog and occlusion"
    )


def _mined(kind: str, config: Mapping[str, Any]) -> str:
    if kind in ("fare", "tecoa"):
        return f"PGD-{config['mining_steps']} on the encoder's tokens in the loop, {255 * config['eps']:g}/255"
    if kind == "adbm":
        return f"{config['mining_steps']} steps in the loop through the network, {255 * config['eps']:g}/255"
    share, steps, top = config["mined"], config["mining_steps"], 255 * config["max_eps"]
    if (replay := config.get("replay", 1)) > 1:
        return (
            f"each batch trained on {replay} times while its perturbation ascends the loss through the purifier, "
            f"to at most {top:g}/255; {share:.0%} of the batches from random starts"
        )
    return f"{share:.0%} of the steps mined through the purifier, {steps} steps at 1 to {top:g}/255"


def results_table(run: str | Path, defense: str) -> str:
    """A Markdown table of the scores of ``defense`` in a run of `codefend eval`: clean, oblivious and adaptive lines.

    Raises CodefendError when the run has no such defense.
    """
    entries = [entry for entry in summarize(read_rows(run)) if entry.group.defense == defense]
    if not entries:
        raise CodefendError(f"{run} has no rows of defense {defense!r}; give --defense the name in that run")
    lines = ["| task | threat | attack | eps | score, 95% interval | of clean | n |", "|---|---|---|---|---|---|---|"]
    for entry in entries:
        group, score = entry.group, entry.score
        retained = "" if math.isnan(entry.retained) else f"{entry.retained:.0%}"
        cells = (group.task, group.threat, group.attack, eps_label(group.eps, entry.norm))
        interval = f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]"
        lines.append(f"| {' | '.join(cells)} | {entry.metric} {interval} | {retained} | {score.n} |")
    return "\n".join(lines)


def add_results(folder: str | Path, table: str, source: str) -> Path:
    """Write a Markdown ``table`` of results into the folder's card, in place of an earlier one; returns its path.

    Raises CodefendError when the folder has no card.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        raise CodefendError(f"{folder} has no {CARD_FILE}: it is not the weights folder of a training")
    head = path.read_text(encoding="utf-8").partition("\n## Results")[0].rstrip()
    write_atomic(path, f"{head}\n\n## Results\n\n`{source}`\n\n{table.strip()}\n")
    return path
