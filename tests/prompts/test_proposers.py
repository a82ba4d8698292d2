"""Proposals of models are cleaned or refused, endpoints fail gracefully, edit operators never fail."""

from __future__ import annotations

import json

import httpx2
import pytest

from codefend.prompts.operators import MAX_SENTENCES, SENTENCES, EditOperators, split_sentences
from codefend.prompts.proposers import (
    KEY_VARIABLE,
    MAX_FAILURES,
    BadProposal,
    ChatEndpoint,
    FallbackProposer,
    ModelProposer,
    clean_proposal,
    request_text,
)
from codefend.types import CodefendError

FAILURE = {"family": "joint", "question": "q?", "answer": "blue", "expected": "red"}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('"Look closely."', "Look closely."),
        ("New instruction: Look\n\nclosely. ", "Look closely."),
        ("```text\nLook closely.\n```", "Look closely."),
        ("Look\x00closely\x1b.", "Look closely ."),
    ],
)
def test_a_proposal_is_extracted_from_the_reply(raw: str, text: str) -> None:
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
def test_unusable_proposals_are_refused(raw: str, why: str) -> None:
    with pytest.raises(BadProposal, match=why):
        clean_proposal(raw)


def test_a_request_holds_the_text_and_the_mistakes() -> None:
    text = request_text("prefix", "Look.", [FAILURE])
    assert 'Its prefix instruction is now: "Look."' in text
    assert 'joint: asked "q?", answered "blue", expected "red"' in text
    assert all(len(line) <= 400 for line in request_text("prefix", "x" * 9000, [FAILURE]).split("\n"))


def test_operators_make_small_edits_that_depend_on_their_arguments_alone() -> None:
    operators, text = EditOperators(seed=3), ""
    texts = set()
    for turn in range(60):
        new = operators("prefix", text, [FAILURE], turn)
        assert new == operators("prefix", text, [FAILURE], turn)
        assert abs(len(split_sentences(new)) - len(split_sentences(text))) <= 1
        assert len(split_sentences(new)) <= MAX_SENTENCES
        texts.add(new)
        text = new
    assert len(texts) > 20


def test_operators_draw_the_sentences_that_suit_the_mistakes() -> None:
    for family, need in (("joint", "firm"), ("joint-targeted", "firm"), ("clean", "helpful"), ("apgd", "doubt")):
        texts = {EditOperators()("prefix", "", [{"family": family}], turn) for turn in range(30)}
        assert texts <= set(SENTENCES[need])  # type: ignore[index]
        assert len(texts) > 2


def endpoint(answer: object, *, status: int = 200) -> tuple[ChatEndpoint, list[httpx2.Request]]:
    requests: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(status, json=answer)

    return ChatEndpoint("http://host/v1/", "m", transport=httpx2.MockTransport(handle)), requests


def test_an_endpoint_gets_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    complete, requests = endpoint({"choices": [{"message": {"content": "Instruction: be careful."}}]})
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert ModelProposer(complete, "m")("prefix", "", [FAILURE], 1) == "be careful."
    assert str(requests[0].url) == "http://host/v1/chat/completions"
    assert requests[0].headers["authorization"] == "Bearer secret"
    assert json.loads(requests[0].content)["model"] == "m"
    monkeypatch.delenv(KEY_VARIABLE)
    complete("x")
    assert "authorization" not in requests[1].headers


def test_no_message_shows_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret\r\n")  # as in a file from Windows
    complete, requests = endpoint({"choices": [{"message": {"content": "be careful."}}]})
    assert FallbackProposer(ModelProposer(complete, "m"), EditOperators())("prefix", "", [FAILURE], 1) == "be careful."
    assert requests[0].headers["authorization"] == "Bearer secret"
    for key in ("secret\rtwo", "secret\u2019"):
        monkeypatch.setenv(KEY_VARIABLE, key)
        for ask in (lambda: complete("x"), lambda: ChatEndpoint("http://host", "m")):
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
        ChatEndpoint("localhost:8000", "m")
    with pytest.raises(CodefendError, match=r"gepa\.model"):
        ChatEndpoint("http://localhost:8000", "")


def test_a_failing_proposer_is_replaced_and_finally_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    replies = iter(["good one.", "", "x" * 9999, "", "never used"])
    requests = []

    def complete(prompt: str, turn: int) -> str:
        requests.append(prompt)
        return next(replies)

    proposer = FallbackProposer(ModelProposer(complete, "m"), EditOperators())
    texts = [proposer("prefix", "", [FAILURE], turn) for turn in range(6)]
    assert texts[0] == "good one."
    assert set(texts[1:]) <= set(SENTENCES["firm"])
    assert len(requests) == 1 + MAX_FAILURES
    assert capsys.readouterr().err.count("proposal refused") == MAX_FAILURES
