"""A bridge for a Transformers model of your own: four commands, Parquet, streams, guidance, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gateway_kit
import hf_tiny
from codefend import purifiers
from codefend.cli import main
from codefend.core.runs import read_rows
from codefend.gateway.app import create_app
from codefend.purifiers.nets import NetConfig, PurifierNet, save_net
from codefend.training.bridge import BridgeConfig
from codefend.training.fit import _micro_batches
from codefend.training.guides import AnswerGuide, load_guide
from codefend.training.pairs import read_pairs
from codefend.training.parallel import Processes
from codefend.types import CodefendError

TINY = NetConfig(channels=(8, 12), blocks=(1, 1), embedding=16)
SHORT = ["steps=2", "batch=4", "warmup=1", "mined=0.5", "mining_steps=1", "save_every=1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved victim, a prior, and a small bank of `codefend pairs`."""
    root = tmp_path_factory.mktemp("own")
    victim = hf_tiny.folder_of("qwen2_5_vl", root)
    save_net(root / "prior", PurifierNet(TINY), kind="prior")
    own = f"--set victim=hf:{victim}:max_new_tokens=4,device=cpu".split()
    command = ["pairs", "own-pairs", "--run", str(root / "pairs"), "--parquet", str(root / "table"), *own]
    assert main([*command, *settings(["count=24", "steps=1", "answer_steps=1", "shard=8"])]) == 0
    return {"root": root, "victim": victim, "prior": root / "prior", "pairs": root / "pairs", "table": root / "table"}


def settings(items: list[str]) -> list[str]:
    return [part for item in items for part in ("--set", item)]


def test_four_commands_lead_from_a_model_to_a_served_defense(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = f"hf:{folders['victim']}:max_new_tokens=4,device=cpu"
    rows = read_rows(folders["pairs"])
    assert {row["kind"] for row in rows} == {"features", "towards", "answers"}
    assert all(row["target"].startswith("hf:") for row in rows)
    assert np.mean([pair["fall"] for row in rows for pair in row["pairs"]]) > 0
    own = settings([f"victim={victim}", f"pairs={folders['pairs']}", f"prior={folders['prior']}", *SHORT])
    assert main(["train", "own-bridge", "--run", str(tmp_path / "bridge"), *own]) == 0
    weights = tmp_path / "bridge" / "weights"
    for row in read_rows(tmp_path / "bridge"):
        assert all(row[term] > 0 for term in ("bridge", "features", "words"))
    evaluation = settings([f"victim={victim}", "tasks=vqa", f"defenses=none,{weights}", "attacks=apgd", "steps=1"])
    evaluation += settings([f"adaptive={weights}", "adaptive_limit=1", "batch=2"])
    assert main(["eval", "--run", str(tmp_path / "eval"), "--limit", "2", *evaluation]) == 0
    assert {(row["defense"], row["threat"]) for row in read_rows(tmp_path / "eval")} >= {(str(weights), "T2")}
    capsys.readouterr()

    async def ask() -> Any:
        app = create_app(gateway_kit.settings(upstream=victim, purifier=str(weights), isolate=False, workers=1))
        async with gateway_kit.gateway(gateway_kit.Upstream(), app=app) as client:
            return await client.post(gateway_kit.CHAT, json=gateway_kit.chat(gateway_kit.png(1, height=56, width=56)))

    answer = gateway_kit.run(ask())
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_parquet_has_the_pairs_of_the_bank(folders: dict[str, Path]) -> None:
    bank, table = (list(read_pairs(folders[name])) for name in ("pairs", "table"))
    assert [kind for *_, kind in bank] == [kind for *_, kind in table]
    for first, second in zip(bank, table, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    from pyarrow import parquet

    file = parquet.ParquetFile(folders["table"] / "train-00000.parquet")
    notes = json.loads(file.schema_arrow.metadata[b"huggingface"])
    assert notes["info"]["features"]["clean"] == {"_type": "Image"}
    first = file.read_row_group(0).to_pylist()[0]
    rows = read_rows(folders["pairs"])
    assert first["eps"] == pytest.approx(rows[0]["pairs"][0]["eps"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_datasets_streams_the_parquet(folders: dict[str, Path]) -> None:
    datasets = pytest.importorskip("datasets", reason="optional: reads the Parquet files")
    stream = datasets.load_dataset("parquet", data_dir=str(folders["table"]), split="train", streaming=True)
    shard = next(iter(read_pairs(folders["pairs"])))
    for index, row in zip(range(3), stream, strict=False):
        for side, expected in zip(("clean", "attacked"), shard[:2], strict=True):
            assert np.array_equal(np.asarray(row[side]), expected[index].permute(1, 2, 0).numpy())


def bridge(folders: dict[str, Path], **changes: Any) -> BridgeConfig:
    short = {"steps": 3, "batch": 2, "warmup": 1, "mining_steps": 1, "save_every": 1, "encoders": ("victim",)}
    places = {"pairs": (str(folders["table"]),), "prior": str(folders["prior"]), "stream": True}
    victim = f"hf:{folders['victim']}:max_new_tokens=4,device=cpu"
    return BridgeConfig(**{**short, **places, "victim": victim, "micro": 2, **changes})


def test_a_streamed_training_resumes_exactly(
    folders: dict[str, Path], tmp_path: Path, interrupt: Callable[[Callable[[], object], int], None]
) -> None:
    config = bridge(folders, mined=0.0, w_words=0.0)
    whole = config.train(tmp_path / "whole")
    interrupt(lambda: config.train(tmp_path / "cut"), 2)
    cut = config.train(tmp_path / "cut")
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(purifiers.load(whole)(image), purifiers.load(cut)(image))


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one(folders: dict[str, Path], tmp_path: Path) -> None:
    config = bridge(folders, mined=0.5)
    one = config.train(tmp_path / "one")
    changes = [
        f"{key}={value if not isinstance(value, tuple) else ','.join(value)}" for key, value in vars(config).items()
    ]
    changes = [item for item in changes if item.partition("=")[0] not in ("residual_bound",)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["-m", "codefend", "train", "own-bridge", "--run", str(tmp_path / "two"), *settings(changes)]
    environment = {**os.environ, "CODEFEND_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    alone, together = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    assert len(alone) == len(together) == config.steps
    for first, second in zip(alone, together, strict=True):
        for key in ("bridge", "features", "words", "direction", "grad_norm"):
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5), key
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(purifiers.load(one)(image), purifiers.load(tmp_path / "two" / "weights")(image), atol=1e-3)


def test_micro_batches_are_shared_evenly() -> None:
    both = [_micro_batches(lambda number: number * 10, 4, rank, 2, 3) for rank in range(2)]
    assert both == [[(12, 120), (14, 140)], [(13, 130), (15, 150)]]
    assert _micro_batches(str, 4, 0, 1, 3) == [(n, str(n)) for n in (12, 13, 14, 15)]
    with pytest.raises(CodefendError, match="cannot be shared by 2"):
        Processes(count=2).check_micro(3)


def test_a_victim_of_your_own_guides_by_its_answers_and_features(folders: dict[str, Path]) -> None:
    guide = load_guide(f"hf:{folders['victim']}:max_new_tokens=4,device=cpu", ["victim"])
    assert isinstance(guide, AnswerGuide)
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(guide.divergence(images, images), torch.zeros(2), atol=1e-6)
    x = (images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    divergence = guide.divergence(images, x)
    assert (divergence > 1e-6).all()
    assert (torch.autograd.grad(divergence.sum(), x)[0].flatten(1).norm(dim=1) > 0).all()
    prompts, answers = guide.answers(images)
    loss: Tensor = guide.victim.loss(x, prompts, answers)
    assert torch.allclose(guide.objective(images)(x), -loss)
    assert torch.equal(guide.encoder(0).features(images), guide.victim.features(images))
    with pytest.raises(CodefendError, match="at least one encoder"):
        load_guide(f"hf:{folders['victim']}:device=cpu", [])
