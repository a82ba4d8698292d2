"""Names that others write down: verbs, options, registries, the front door, presets' settings, exit codes, tasks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from goldens import kit

VERBS = (
    *("purify", "export", "ask", "caption", "attack", "pairs", "train", "calibrate", "card", "eval", "report"),
    *("leaderboard", "demo", "list", "optimize-prompt", "prompts", "serve"),
)
PROMPT_VERBS = ("list", "show", "apply", "table")
LISTS = ("purifiers", "attacks", "victims", "tasks", "prompts", "presets")
PASSING = ("ablation-",)  # presets that may become recipe files
PRESETS = {  # preset to the verb that takes it, with its required settings
    "pairs": ("pairs", "pairs"),
    "own-pairs": ("pairs", "own-pairs", "--set", "victim=hf:x"),
    "pocket": ("train", "pocket"),
    "prior": ("train", "prior"),
    "bridge": ("train", "bridge"),
    "bridge-robust": ("train", "bridge-robust"),
    "bridge-replay": ("train", "bridge-replay"),
    "fare": ("train", "fare"),
    "hf-bridge": ("train", "hf-bridge"),
    "latent": ("train", "latent"),
    "quick": ("eval", "quick"),
    "standard": ("eval", "standard"),
    "photographs": ("eval", "photographs"),
    "transfer": ("eval", "transfer"),
}
OPTION = re.compile(r"^\W*(?:-\w,? +)?(--[a-z][a-z0-9-]*)", re.MULTILINE)

# Mistakes of users: each ends with code 2, nothing on standard output and one line on standard error.
MISTAKES = (
    ("nonsense",),
    ("list", "purifierz"),
    ("list",),
    ("purify", "absent.png", "--out", "x.png"),
    ("purify", "{image}", "--out", "x.png", "--purifier", "brigde"),
    ("purify", "{image}", "--out", "x.png", "--purifier", "bridge:sigmma=1"),
    ("purify", "{image}", "--out", "x.png", "--purifier", "bridge:sigma=much"),
    ("purify", "{image}", "--out", "x.png", "--seed", "x"),
    ("purify", "{image}"),
    ("purify", "{image}", "--out", "x.png", "--nonsense"),
    ("ask", "{image}", "what?", "--defense", "brigde"),
    ("ask", "{image}", "what?", "--defense", "none+prompt=dout"),
    ("ask", "{image}", "what?", "--victim", "pokcet"),
    ("attack", "{image}", "--out", "x.png", "--attack", "apgdd"),
    ("attack", "{image}", "--out", "x.jpg"),
    ("attack", "{image}", "--out", "x.png", "--eps", "8"),
    ("attack", "{image}", "--out", "x.png", "--norm", "l3"),
    ("attack", "{image}", "--out", "x.png", "--attack", "apgd-targeted"),
    ("attack", "{image}", "--out", "x.png", "--question", "a", "--caption"),
    ("train", "brigde", "--run", "r"),
    ("train", "bridge", "--run", "r"),
    ("train", "bridge", "--run", "r", "--set", "stepz=3"),
    ("train", "bridge", "--run", "r", "--set", "steps=many"),
    ("train", "quick", "--run", "r"),
    ("train", "bridge"),
    ("pairs", "quick", "--run", "r"),
    ("pairs", "--run", "r", "--set", "encoders=lite9"),
    ("eval", "quick", "--run", "r", "--set", "tasks="),
    ("eval", "quick", "--run", "r", "--set", "eps=0.03"),
    ("eval", "quick", "--run", "r", "--set", "threats=T1"),
    ("eval", "quick", "--run", "r", "--set", "threats=T9"),
    ("eval", "quick", "--run", "r", "--set", "attacks=apgd:stepz=3"),
    ("eval", "quick", "--run", "r", "--set", "adaptive=jpeg:quality=3"),
    ("report", "absent"),
    ("leaderboard", "absent"),
    ("card", "absent"),
    ("calibrate", "absent"),
    ("export", "--out", "x.onnx", "--purifier", "brigde"),
    ("prompts", "apply", "dout", "hi"),
    ("prompts", "apply", "soft-pocket", "hi"),
    ("prompts", "show", "dout"),
    ("optimize-prompt", "--run", "r", "--method", "luck"),
    ("serve",),
    ("serve", "--upstream", "nowhere"),
    ("serve", "--upstream", "http://localhost:1", "--purifier", "brigde"),
    ("serve", "--upstream", "http://localhost:1", "--port", "x"),
    ("--precision", "float16", "list", "tasks"),
)


def options(*verb: str) -> list[str]:
    """Option names in the help of a verb."""
    return sorted(set(OPTION.findall(kit.run_well(*verb, "--help").out)))


def names(kind: str) -> list[str]:
    lines = kit.run_well("list", kind).out.splitlines()
    return sorted(n for n in (line.split()[0] for line in lines if line.strip()) if not n.startswith(PASSING))


# Names of the front door on 2026-11-29. ``UserError`` still works, and is no longer advertised.
PUBLIC = (
    *("Budget", "DefendedVictim", "Defense", "Example", "StraightThrough", "Task", "UserError", "__version__"),
    *("load_purifier", "load_task", "load_victim", "wrap"),
)


def front() -> dict[str, Any]:
    """What ``codefend`` offers: verbs with their options, registries, public names."""
    import codefend

    return {
        "version": kit.run_well("--version").out.split()[0],
        "front": options(),
        "verbs": {verb: options(verb) for verb in VERBS},
        "prompt verbs": {verb: options("prompts", verb) for verb in PROMPT_VERBS},
        "lists": {kind: names(kind) for kind in LISTS},
        "prompts list": sorted(line.split()[0] for line in kit.run_well("prompts", "list").out.splitlines()),
        "public": [name for name in PUBLIC if hasattr(codefend, name)],
    }


def presets() -> dict[str, Any]:
    """Every setting of the presets that ``--dry-run`` prints, with its value."""
    return {name: kit.run_well(*arguments, "--run", "unused", "--dry-run").json for name, arguments in PRESETS.items()}


def mistakes(place: Path) -> dict[str, Any]:
    """Exit code of each mistake, what it printed, how many lines tell of it, and which files it left behind."""
    records = {}
    for arguments in MISTAKES:
        outcome = kit.run(*(word.format(image=kit.DATA / "input.png") for word in arguments))
        records[" ".join(arguments)] = {
            "code": outcome.code,
            "out": outcome.out,
            "errors": sum(line.startswith("error: ") for line in outcome.err.splitlines()),
            "traceback": "Traceback" in outcome.err,
            "left": sorted(p.name for p in place.iterdir()),
        }
    return records


def library_errors() -> dict[str, Any]:
    """Errors of the front door: one class, and the nearest name in the message."""
    import codefend

    records = {}
    calls = {
        "purifier": lambda: codefend.load_purifier("brigde"),
        "purifier option": lambda: codefend.load_purifier("bridge", sigmma=1),
        "victim": lambda: codefend.load_victim("pokcet"),
        "task": lambda: codefend.load_task("captoin"),
        "task split": lambda: codefend.load_task("caption-shift", split="train"),
        "task limit": lambda: codefend.load_task("caption", limit=0),
    }
    for name, call in calls.items():
        try:
            call()
        except codefend.UserError as error:
            words = set(re.findall(r"[a-z-]+", str(error)))
            nearest = words & {"bridge", "sigma", "pocket", "caption", "test", "limit"}
            records[name] = {"one line": "\n" not in str(error), "names": sorted(nearest)}
    return records


def tasks() -> dict[str, Any]:
    """The frozen test sets: questions and images."""
    import codefend

    records = {}
    for name in ("caption", "vqa", "caption-shift", "vqa-shift", "easy-vqa"):
        task = codefend.load_task(name, limit=5)
        examples = [
            {
                "id": example.id,
                "prompt": example.prompt,
                "references": list(example.references),
                "kind": example.kind,
                "tags": list(example.tags),
                "image": kit.digest((example.image * 255).round().to(torch.uint8).numpy())[:16],
            }
            for example in task.examples
        ]
        metrics = {key: _scores(metric, task) for key, metric in task.metrics.items()}
        records[name] = {
            "examples": examples,
            "count": len(codefend.load_task(name).examples),
            "headline": task.headline,
            "target": task.target,
            "metrics": metrics,
        }
    return records


def _scores(metric: Any, task: Any) -> list[float | None]:
    answers = ["a green guitar", "no", task.examples[2].references[0], "", "two dogs and a car"]
    values = metric(answers, list(task.examples)).double().tolist()
    return [None if np.isnan(value) else float(value) for value in values]


def victim() -> dict[str, Any]:
    """The pocket: answers, losses, features."""
    import codefend

    model: Any = codefend.load_victim("pocket")
    examples = [*codefend.load_task("caption", limit=2).examples, *codefend.load_task("vqa", limit=2).examples]
    images = torch.stack([example.image for example in examples])
    prompts = [example.prompt for example in examples]
    with kit.deterministic(), torch.no_grad():
        features = model.features(images)
        losses = model.loss(images, prompts, [example.references[0] for example in examples])
        return {
            "name": model.name,
            "answers": model.generate(images, prompts),
            "losses": [float(loss) for loss in losses],
            "features": {"shape": list(features.shape), "norms": features.norm(dim=(1, 2)).tolist()},
        }
