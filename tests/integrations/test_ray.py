"""A real Ray cluster of two workers writes what one process writes, and keeps on when a worker is killed."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch

import corpus_kit as kit
import toys
from codefend.bench import evaluate
from codefend.bench.setup import Loaders
from codefend.core import images
from codefend.integrations.ray import BatchPurifier, RayOptions, on_ray, ray_pool
from codefend.training import pairs
from codefend.training.frozen import load_encoders
from codefend.training.pairs import PairsConfig
from codefend.types import CodefendError, Victim
from evaluate_kit import SMALL, untimed

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]  # Ray's own warnings; it starts slowly


@pytest.mark.usefixtures("cluster")
def test_a_cluster_writes_the_same_bytes(tmp_path: Path) -> None:
    corpus = kit.write_all(tmp_path / "in")
    (corpus / "broken.png").write_bytes(b"no image")
    one = kit.run(corpus, tmp_path / "one", "bridge:sigma=0.1")
    two = kit.run(corpus, tmp_path / "two", "bridge:sigma=0.1", engine=on_ray(RayOptions(workers=2)))
    assert (two.images, two.failures, two.failed) == (one.images, one.failures, one.failed)
    assert kit.contents(tmp_path / "two") == kit.contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_pipeline_of_your_own_purifies_the_same(tmp_path: Path) -> None:
    kit.run(kit.write_table(tmp_path / "in" / "x.parquet"), tmp_path / "out", "bridge:sigma=0.1")
    expected = pq.read_table(tmp_path / "out" / "x.parquet").column("image").to_pylist()
    purified = ray.data.read_parquet(str(tmp_path / "in")).map_batches(
        BatchPurifier,
        fn_constructor_kwargs={"purifier": "bridge:sigma=0.1"},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows = sorted(purified.take_all(), key=lambda row: row["id"])
    assert [row["image"]["bytes"] for row in rows] == [value["bytes"] for value in expected]
    assert [list(row["tags"]) for row in rows] == [["x", "y"]] * 6


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    corpus = kit.write_all(tmp_path / "in", 200)
    kit.run(corpus, tmp_path / "one")
    finished = 0

    def killing(purify, units, tick):  # type: ignore[no-untyped-def]
        nonlocal finished
        for report in on_ray(RayOptions(workers=2))(purify, units, tick):
            finished += 1
            if finished == 2:
                actors = [child for child in psutil.Process().children(recursive=True) if "MapWorker" in child.name()]
                os.kill(actors[0].pid, signal.SIGKILL)
            yield report

    kit.run(corpus, tmp_path / "two", engine=killing)
    assert kit.contents(tmp_path / "two") == kit.contents(tmp_path / "one")


def test_a_cluster_that_does_not_answer_is_one_line(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    command = ("purify", kit.write_folder(tmp_path / "in"), "-o", tmp_path / "out", "--purifier", "bitdepth")
    code, _, err = run(*command, "--engine", "ray", "--address", "127.0.0.1:1")
    assert code == 2
    assert "cannot reach the Ray cluster at 127.0.0.1:1: [Errno 111] Connection refused" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["eval", "pairs"])
def test_a_cluster_that_does_not_answer_leaves_no_run_folder(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    code, _, err = run(verb, "--run", tmp_path / "run", "--engine", "ray", "--address", "ray://127.0.0.1:1")
    assert code == 2
    assert "cannot reach the Ray cluster at ray://127.0.0.1:1" in err
    assert not (tmp_path / "run").exists()


def test_a_column_keeps_the_type_of_its_images() -> None:
    purify = BatchPurifier("bitdepth")
    array = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = images.to_pil(torch.from_numpy(array / np.float32(255)).permute(2, 0, 1))
    image.save(buffer, "PNG")
    batch = purify({"image": [array, image, buffer.getvalue(), {"bytes": buffer.getvalue(), "path": None}, None]})
    pixels, pil, data, struct, nothing = batch["image"]
    assert np.array_equal(pixels, np.asarray(pil))
    assert data == struct["bytes"]
    assert np.array_equal(np.asarray(images.to_pil(images.load(data).pixels)), pixels)
    assert nothing is None
    assert purify({"image": np.stack([array, array])})["image"].shape == (2, 8, 9, 3)
    assert purify({"image": [b"no image"]})["image"] == [None]
    assert purify.failures == 1
    for wrong in ({"pixels": []}, {"image": ["text"]}, {"image": [array.astype(np.float32)]}):
        with pytest.raises(CodefendError, match="column"):
            purify(wrong)


def toy_victim(name: str) -> Victim:
    return toys.ToyVictim()


@pytest.mark.usefixtures("cluster")
def test_an_evaluation_on_a_cluster_has_the_rows_of_one_process(tmp_path: Path) -> None:
    loaders = Loaders(victim=toy_victim, task=toys.task, purifier=toys.purifier)
    config = replace(SMALL, steps=2, limit=6, batch=3)
    whole = untimed(evaluate(config, tmp_path / "one", loaders=loaders))
    pool = ray_pool(RayOptions(workers=2))
    assert untimed(evaluate(config, tmp_path / "two", loaders=loaders, workers=2, pool=pool)) == whole


def small_source(config: PairsConfig) -> pairs._ShardSource:
    victim = toys.ToyVictim()
    return pairs._ShardSource(config, victim, load_encoders(config.encoders, victim))


def start_small(config: PairsConfig) -> None:
    pairs._source.append(small_source(config))


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.usefixtures("cluster")
def test_pairs_on_a_cluster_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_open_source", small_source)
    monkeypatch.setattr(pairs, "_start", start_small)
    config = PairsConfig(encoders=("lite0",), count=8, kinds=("features", "towards"), steps=1, shard=4)
    alone = pairs.make_pairs(config, tmp_path / "one")
    pool = ray_pool(RayOptions(workers=2, cpus=torch.get_num_threads()))  # as many threads
    spread = pairs.make_pairs(config, tmp_path / "two", workers=2, pool=pool)
    names = {path.name for path in alone.iterdir() if path.name.startswith(("rows", "pairs"))}
    assert len(names) == 3
    assert all((spread / name).read_bytes() == (alone / name).read_bytes() for name in names)
