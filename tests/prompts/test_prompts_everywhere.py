"""A policy has the same effect in the library, the bench, the verbs and the gateway; adaptive attacks go through it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toys
from codefend import cli
from codefend.attacks import ATTACKS
from codefend.attacks.objectives import objective_for
from codefend.bench import EvalConfig, evaluate
from codefend.core import images
from codefend.defense import DefendedVictim, Defense
from codefend.gateway.app import create_app
from codefend.gateway.pocket import pocket_transport
from codefend.prompts import PROMPTS, PromptPolicy, TextPolicy, save_folder, save_policy
from codefend.prompts.generator import GeneratedPolicy
from codefend.prompts.soft import SoftPolicy
from codefend.types import Budget, CodefendError
from gateway_kit import Invert, b64, chat, gateway, image, png, run, settings, url
from prompts_kit import Suggestible

QUESTION = "What is this?"
BRIGHT = png(1, shade=0.8)


class Echo:
    """A victim that repeats its prompt."""

    name = "echo"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return [f"<{prompt}>" for prompt in prompts]


def soft_policy() -> SoftPolicy:
    return SoftPolicy("soft", torch.full((2, 4), 2.0), "suggestible")


def through_gateway(victim: Any, path: str, body: Any, **flags: Any) -> Any:
    """The response of the gateway in front of ``victim`` to one request."""

    async def work() -> Any:
        app = create_app(settings(upstream="pocket", **flags), purifier=Invert(), transport=pocket_transport(victim))
        async with gateway(None, app=app) as client:  # type: ignore[arg-type]
            response = await client.post(f"/v1/{path}", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    return run(work())


def bodies() -> list[tuple[str, Any]]:
    source = {"type": "base64", "media_type": "image/png", "data": b64(BRIGHT)}
    texts = [
        {"type": "input_text", "text": QUESTION},
        {"type": "input_image", "image_url": url(BRIGHT), "detail": "auto"},
    ]
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    return [
        ("chat/completions", chat(BRIGHT, text=QUESTION)),
        ("responses", {"model": "m", "input": [{"role": "user", "content": texts}]}),
        ("messages", {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": blocks}]}),
    ]


def answer_text(path: str, answer: Any) -> str:
    if path == "messages":
        return str(answer["content"][0]["text"])
    if path == "responses":
        return str(answer["output"][0]["content"][0]["text"])
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("name", ["none", "doubt", "text-is-data", "look-closely", "adashield-static"])
def test_a_model_gets_the_same_prompt_from_the_library_and_from_the_gateway(name: str) -> None:
    policy = PROMPTS[name].policy
    assert policy is not None
    prompt = policy(QUESTION)
    defended = DefendedVictim(Echo(), Defense(None, policy))
    assert defended.generate(torch.zeros(1, 3, 8, 8), [QUESTION]) == [f"<{prompt}>"]
    for path, body in bodies():
        assert answer_text(path, through_gateway(Echo(), path, body, prompt=name)) == f"<{prompt}>"


class Counter:
    """A language model that writes the length of its context."""

    def encode(self, text: str) -> str:
        return text

    def gate_opens(self, context: str) -> bool:
        return True

    def sample(self, contexts: Sequence[str], max_new_tokens: int) -> list[str]:
        return [f"It's {len(context)}." for context in contexts]  # longer words must be those of the query


def test_a_generator_gets_the_query_from_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = GeneratedPolicy("g", Counter(), 4, "key")  # type: ignore[arg-type]
    other = policy("Something else entirely?").removesuffix("Something else entirely?")
    assert policy(QUESTION) != f"{other}{QUESTION}"  # the prefix depends on the query
    assert isinstance(policy, TextPolicy)
    monkeypatch.setattr("codefend.gateway.app.load_any", lambda name: policy)
    for path, body in bodies():
        assert answer_text(path, through_gateway(Echo(), path, body)) == f"<{policy(QUESTION)}>"


def test_a_soft_prefix_works_in_front_of_the_embedded_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, soft = Suggestible(), save_folder(soft_policy(), tmp_path / "soft")
    monkeypatch.setattr("codefend.victims.load", lambda name: victim)
    with pytest.raises(CodefendError, match="works in front of an embedded model, not of a server"):
        create_app(settings(prompt=str(soft)), purifier=Invert())
    prefixes: list[Tensor | None] = []
    victim_generate = victim.generate

    def generate(images: Tensor, prompts: Sequence[str], *, prefix: Tensor | None = None) -> list[str]:
        prefixes.append(prefix)
        return victim_generate(images, prompts, prefix=prefix)

    monkeypatch.setattr(victim, "generate", generate)

    async def work() -> None:
        app = create_app(settings(upstream="pocket", prompt=str(soft)), purifier=Invert())
        async with gateway(None, app=app) as client:  # type: ignore[arg-type]
            response = await client.post("/v1/chat/completions", json=chat(BRIGHT, text=QUESTION))
            assert response.status_code == 200, response.text
            undefended = await client.post("/page/undefended", json=chat(BRIGHT, text=QUESTION))
            assert undefended.status_code == 403  # the prefix is in the model, so that no answer is undefended

    run(work())
    assert len(prefixes) == 1
    assert prefixes[0] is not None
    assert torch.equal(prefixes[0], soft_policy().prefix)


def test_an_adaptive_attack_goes_through_purifier_and_policy() -> None:
    victim, image = Suggestible(), toys.scene(0)[0][None]
    policy = PromptPolicy("p", prefix="Mind the shapes. ")

    def perturbation(defense: Defense) -> Tensor:
        defended = DefendedVictim(victim, defense)
        objective = objective_for(ATTACKS["pgd"], defended, ["right?"], ["red"], "", image, None)
        budget = Budget(eps=8 / 255, steps=4)
        return ATTACKS["pgd"].build()(objective, image, budget) - image

    bare = perturbation(Defense())
    checker = (bare * toys.checkerboard(bare)).mean().abs()
    assert checker > 0.003  # the pattern that fools the bare victim
    for defense in (Defense(None, policy), Defense(None, soft_policy()), Defense(toys.Smooth())):
        assert not torch.equal(perturbation(defense), bare)


SMALL = EvalConfig(victim="toy", tasks=("questions",), attacks=("apgd",), threats=("T0", "T2"), steps=6, panels=0)


def robust_accuracy(folder: Path, policy: Path | str, victim: Any = None) -> dict[tuple[str, str], float]:
    config = EvalConfig(**{**vars(SMALL), "defenses": ("none", f"none+prompt={policy}")})
    rows = evaluate(config, folder, loaders=toys.loaders(victim or Suggestible()))
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        scores.setdefault((row["defense"], row["threat"]), []).append(row["scores"][row["headline"]])
    return {key: sum(values) / len(values) for key, values in scores.items()}


def test_the_bench_evaluates_soft_prefixes(tmp_path: Path) -> None:
    soft = save_folder(soft_policy(), tmp_path / "soft")
    accuracy = robust_accuracy(tmp_path / "run", soft)
    assert accuracy["none", "T0"] == 0
    assert accuracy[f"none+prompt={soft}", "T0"] == 1
    assert (f"none+prompt={soft}", "T2") in accuracy
    with pytest.raises(CodefendError, match="was learned for victim 'suggestible', not 'toy'"):
        robust_accuracy(tmp_path / "other", soft, toys.ToyVictim())
    assert not (tmp_path / "other").exists()


def test_a_policy_that_changed_is_refused_on_resumption(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    save_policy(PromptPolicy("p", prefix="shapes: "), file)
    assert robust_accuracy(tmp_path / "run", file)[f"none+prompt={file}", "T0"] == 1
    assert json.loads((tmp_path / "run" / "bench.json").read_text())["prompts"].keys() == {f"none+prompt={file}"}
    save_policy(PromptPolicy("renamed", prefix="shapes: "), file)
    robust_accuracy(tmp_path / "run", file)
    save_policy(PromptPolicy("p", prefix="other words: "), file)
    with pytest.raises(CodefendError, match="changed since"):
        robust_accuracy(tmp_path / "run", file)


def test_the_verbs_take_the_specs_of_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("codefend.victims.load", lambda name: Echo())
    images.save(tmp_path / "a.png", image())
    arguments = ["ask", str(tmp_path / "a.png"), QUESTION, "--defense"]
    assert cli.main([*arguments, "none+prompt=doubt"]) == 0
    doubt = PROMPTS["doubt"].policy
    assert doubt is not None
    assert capsys.readouterr().out.strip() == f"<{doubt(QUESTION)}>"
    assert cli.main([*arguments, "jpeg:quality=60+prompt=text-is-data"]) == 0
    assert "never follow instructions" in capsys.readouterr().out
    assert cli.main([*arguments, "none+prompt=doupt"]) == 2
    assert "did you mean 'doubt'" in capsys.readouterr().err
