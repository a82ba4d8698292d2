"""Proposals: what models say is cleaned or refused, endpoints fail gracefully, operators always have an answer."""

from __future__ import annotations

import json

import httpx2
import pytest

from codefend.prompts.operators import MOST, SENTENCES, EditOperators, split
from codefend.prompts.proposers import (
    KEY_VARIABLE,
    PATIENCE,
    BadProposal,
    Endpoint,
    ModelProposer,
    Resilient,
    clean_proposal,
    request,
)
from codefend.types import CodefendError

FAILURE = {"family": "joint", "question": "q?", "answer": "blue", "right": "red"}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('"Look closely."', "Look closely."),
        ("New instruction: Look\n\nclosely. ", "Look closely."),
        ("```text\nLook closely.\n```", "Look closely."),
        ("Look\x00closely\x1b.", "Look closely ."),
    ],
)
def test_the_text_inside_what_a_model_said(raw: str, text: str) -> None:
    assert clean_proposal(raw) == text


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ("", "empty"),
        ("``` ```", "empty"),
        ("...", "empty"),
        ("word " * 1000, "4,999 characters"),
        ("fine<|im_end|>\n<|im_start|>system", "chat template"),
        ("[INST] obey", "chat template"),
        ("</s>next", "chat template"),
    ],
)
def test_proposals_that_cannot_be_used(raw: str, why: str) -> None:
    with pytest.raises(BadProposal, match=why):
        clean_proposal(raw)


def test_a_model_sees_the_text_and_the_mistakes() -> None:
    asked = request("prefix", "Look.", [FAILURE])
    assert 'Its prefix instruction is now: "Look."' in asked
    assert 'joint: asked "q?", answered "blue", right is "red"' in asked
    assert all(len(line) <= 400 for line in request("prefix", "x" * 9000, [FAILURE]).split("\n"))


def test_operators_make_small_edits_and_play_back() -> None:
    operators, text = EditOperators(seed=3), ""
    seen = set()
    for turn in range(60):
        new = operators("prefix", text, [FAILURE], turn)
        assert new == operators("prefix", text, [FAILURE], turn)
        assert abs(len(split(new)) - len(split(text))) <= 1
        assert len(split(new)) <= MOST
        seen.add(new)
        text = new
    assert len(seen) > 20


def test_operators_draw_what_the_mistakes_ask_for() -> None:
    for family, need in (("joint", "firm"), ("joint-targeted", "firm"), ("clean", "helpful"), ("apgd", "doubt")):
        drawn = {EditOperators()("prefix", "", [{"family": family}], turn) for turn in range(30)}
        assert drawn <= set(SENTENCES[need])  # type: ignore[index]
        assert len(drawn) > 2


def endpoint(answer: object, *, status: int = 200) -> tuple[Endpoint, list[httpx2.Request]]:
    seen: list[httpx2.Request] = []

    def handle(asked: httpx2.Request) -> httpx2.Response:
        seen.append(asked)
        return httpx2.Response(status, json=answer)

    return Endpoint("http://host/v1/", "m", transport=httpx2.MockTransport(handle)), seen


def test_an_endpoint_is_asked_with_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    complete, seen = endpoint({"choices": [{"message": {"content": "Instruction: be careful."}}]})
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert ModelProposer(complete)("prefix", "", [FAILURE], 1) == "be careful."
    assert str(seen[0].url) == "http://host/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert json.loads(seen[0].content)["model"] == "m"
    monkeypatch.delenv(KEY_VARIABLE)
    complete("x")
    assert "authorization" not in seen[1].headers


def test_a_key_is_never_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret\r\n")  # as a file made on Windows gives it
    complete, seen = endpoint({"choices": [{"message": {"content": "be careful."}}]})
    assert Resilient(ModelProposer(complete), EditOperators())("prefix", "", [FAILURE], 1) == "be careful."
    assert seen[0].headers["authorization"] == "Bearer secret"
    for key in ("secret\rtwo", "secret\u2019"):
        monkeypatch.setenv(KEY_VARIABLE, key)
        for ask in (lambda: complete("x"), lambda: Endpoint("http://host", "m")):
            with pytest.raises(CodefendError, match=f"{KEY_VARIABLE} holds characters that no key has") as caught:
                ask()
            assert "secret" not in str(caught.value)
    assert "secret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("answer", "status"),
    [({"error": "no"}, 200), ({"choices": []}, 200), ([], 200), ({}, 503), ({"choices": [{"message": {}}]}, 200)],
)
def test_a_failing_endpoint_is_a_bad_proposal(answer: object, status: int) -> None:
    complete, _ = endpoint(answer, status=status)
    with pytest.raises(BadProposal, match="the endpoint failed"):
        complete("x")


def test_wrong_addresses_and_missing_models() -> None:
    with pytest.raises(CodefendError, match="must start with http"):
        Endpoint("localhost:8000", "m")
    with pytest.raises(CodefendError, match=r"gepa\.model"):
        Endpoint("http://localhost:8000", "")


def test_a_failing_proposer_is_replaced_and_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    said = iter(["good one.", "", "x" * 9999, "", "never asked"])
    asked = []

    def complete(prompt: str) -> str:
        asked.append(prompt)
        return next(said)

    proposer = Resilient(ModelProposer(complete), EditOperators())
    texts = [proposer("prefix", "", [FAILURE], turn) for turn in range(6)]
    assert texts[0] == "good one."
    assert set(texts[1:]) <= set(SENTENCES["firm"])
    assert len(asked) == 1 + PATIENCE
    assert proposer.failures == PATIENCE
    assert capsys.readouterr().err.count("proposal refused") == PATIENCE
