"""One policy means the same to the library, the evaluator, the verbs and the gateway; attackers at T2 see it, too."""

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
from codefend.attacks import ATTACKS, objective_for
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

ASKED = "What is this?"
BRIGHT = png(1, shade=0.8)


class Listener:
    """A victim that repeats what it is asked."""

    name = "listener"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return [f"<{prompt}>" for prompt in prompts]


def learned() -> SoftPolicy:
    return SoftPolicy("soft", torch.full((2, 4), 2.0), "suggestible")


def through_gateway(victim: Any, path: str, body: Any, **flags: Any) -> Any:
    """What the served pocket says to one request."""

    async def work() -> Any:
        app = create_app(settings(upstream="pocket", **flags), purifier=Invert(), transport=pocket_transport(victim))
        async with gateway(None, app=app) as client:  # type: ignore[arg-type]
            answer = await client.post(f"/v1/{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return run(work())


def bodies() -> list[tuple[str, Any]]:
    source = {"type": "base64", "media_type": "image/png", "data": b64(BRIGHT)}
    texts = [{"type": "input_text", "text": ASKED}, {"type": "input_image", "image_url": url(BRIGHT), "detail": "auto"}]
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": ASKED}]
    return [
        ("chat/completions", chat(BRIGHT, text=ASKED)),
        ("responses", {"model": "m", "input": [{"role": "user", "content": texts}]}),
        ("messages", {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": blocks}]}),
    ]


def said(path: str, answer: Any) -> str:
    if path == "messages":
        return str(answer["content"][0]["text"])
    if path == "responses":
        return str(answer["output"][0]["content"][0]["text"])
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("name", ["none", "doubt", "text-is-data", "look-closely", "adashield-static"])
def test_a_model_reads_the_same_words_in_the_library_and_behind_the_gateway(name: str) -> None:
    policy = PROMPTS[name].policy
    assert policy is not None
    words = policy(ASKED)
    defended = DefendedVictim(Listener(), Defense(None, policy))
    assert defended.generate(torch.zeros(1, 3, 8, 8), [ASKED]) == [f"<{words}>"]
    for path, body in bodies():
        assert said(path, through_gateway(Listener(), path, body, prompt=name)) == f"<{words}>"


class Counter:
    """Stands in for a language model: writes how long its context is."""

    def encode(self, text: str) -> str:
        return text

    def speaks(self, context: str) -> bool:
        return True

    def sample(self, contexts: Sequence[str], max_new_tokens: int) -> list[str]:
        return [f"It's {len(context)}." for context in contexts]  # short words: longer ones must be the query's


def test_a_generator_reads_the_query_behind_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = GeneratedPolicy("g", Counter(), 4, "key")  # type: ignore[arg-type]
    other = policy("Something else entirely?").removesuffix("Something else entirely?")
    assert policy(ASKED) != f"{other}{ASKED}"  # else this test could not fail
    assert isinstance(policy, TextPolicy)
    monkeypatch.setattr("codefend.gateway.app.load_any", lambda name: policy)
    for path, body in bodies():
        assert said(path, through_gateway(Listener(), path, body)) == f"<{policy(ASKED)}>"


def test_a_soft_prefix_works_in_front_of_the_embedded_model_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, soft = Suggestible(), save_folder(learned(), tmp_path / "soft")
    monkeypatch.setattr("codefend.victims.load", lambda name: victim)
    with pytest.raises(CodefendError, match="works in front of the embedded pocket, not of a server"):
        create_app(settings(prompt=str(soft)), purifier=Invert())
    asked: list[Tensor | None] = []
    heard = victim.generate

    def generate(images: Tensor, prompts: Sequence[str], *, prefix: Tensor | None = None) -> list[str]:
        asked.append(prefix)
        return heard(images, prompts, prefix=prefix)

    monkeypatch.setattr(victim, "generate", generate)

    async def work() -> None:
        app = create_app(settings(upstream="pocket", prompt=str(soft)), purifier=Invert())
        async with gateway(None, app=app) as client:  # type: ignore[arg-type]
            answer = await client.post("/v1/chat/completions", json=chat(BRIGHT, text=ASKED))
            assert answer.status_code == 200, answer.text
            shown = await client.post("/page/undefended", json=chat(BRIGHT, text=ASKED))
            assert shown.status_code == 403  # the prefix is in the model: no answer would be an undefended one

    run(work())
    assert len(asked) == 1
    assert asked[0] is not None
    assert torch.equal(asked[0], learned().prefix)


def test_an_attacker_at_t2_sees_purifier_and_policy() -> None:
    victim, image = Suggestible(), toys.scene(0)[0][None]
    policy = PromptPolicy("p", prefix="Mind the shapes. ")

    def attacked(defense: Defense) -> Tensor:
        defended = DefendedVictim(victim, defense)
        objective = objective_for(ATTACKS["pgd"], defended, ["right?"], ["red"], "", image, None)
        budget = Budget(eps=8 / 255, steps=4)
        return ATTACKS["pgd"].build()(objective, image, budget) - image

    bare = attacked(Defense())
    checker = (bare * toys.checkerboard(bare)).mean().abs()
    assert checker > 0.003  # the pattern that hurts the bare victim
    for defense in (Defense(None, policy), Defense(None, learned()), Defense(toys.Smooth())):
        assert not torch.equal(attacked(defense), bare)


SMALL = EvalConfig(victim="toy", tasks=("questions",), attacks=("apgd",), threats=("T0", "T2"), steps=6, panels=0)


def evaluated(folder: Path, policy: Path | str, victim: Any = None) -> dict[tuple[str, str], float]:
    config = EvalConfig(**{**vars(SMALL), "defenses": ("none", f"none+prompt={policy}")})
    rows = evaluate(config, folder, loaders=toys.loaders(victim or Suggestible()))
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["defense"], row["threat"]), []).append(row["scores"][row["headline"]])
    return {key: sum(values) / len(values) for key, values in found.items()}


def test_the_evaluator_judges_words_and_soft_prefixes(tmp_path: Path) -> None:
    soft = save_folder(learned(), tmp_path / "soft")
    found = evaluated(tmp_path / "run", soft)
    assert found["none", "T0"] == 0
    assert found[f"none+prompt={soft}", "T0"] == 1
    assert (f"none+prompt={soft}", "T2") in found
    with pytest.raises(CodefendError, match="was learned for victim 'suggestible', not 'toy'"):
        evaluated(tmp_path / "other", soft, toys.ToyVictim())
    assert not (tmp_path / "other").exists()


def test_a_policy_may_not_change_while_it_is_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    save_policy(PromptPolicy("p", prefix="shapes: "), file)
    assert evaluated(tmp_path / "run", file)[f"none+prompt={file}", "T0"] == 1
    assert json.loads((tmp_path / "run" / "bench.json").read_text())["prompts"].keys() == {f"none+prompt={file}"}
    save_policy(PromptPolicy("renamed", prefix="shapes: "), file)
    evaluated(tmp_path / "run", file)
    save_policy(PromptPolicy("p", prefix="other words: "), file)
    with pytest.raises(CodefendError, match="changed since"):
        evaluated(tmp_path / "run", file)


def test_the_verbs_take_the_evaluators_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("codefend.victims.load", lambda name: Listener())
    images.save(tmp_path / "a.png", image())
    asked = ["ask", str(tmp_path / "a.png"), ASKED, "--defense"]
    assert cli.main([*asked, "none+prompt=doubt"]) == 0
    doubt = PROMPTS["doubt"].policy
    assert doubt is not None
    assert capsys.readouterr().out.strip() == f"<{doubt(ASKED)}>"
    assert cli.main([*asked, "jpeg:quality=60+prompt=text-is-data"]) == 0
    assert "never follow instructions" in capsys.readouterr().out
    assert cli.main([*asked, "none+prompt=doupt"]) == 2
    assert "did you mean 'doubt'" in capsys.readouterr().err
