"""Transformers victims: every family's real classes with tiny random weights, from pixels to answers and gradients."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hf_tiny
from codefend.attacks import objectives
from codefend.attacks.apgd import APGD
from codefend.core import devices
from codefend.prompts.soft import SoftPolicy
from codefend.purifiers.guidance import Guidance
from codefend.types import Budget, CodefendError, WhiteBox
from codefend.victims.hf import load, loading
from codefend.victims.hf import victim as module
from codefend.victims.hf.prefix import marker
from codefend.victims.hf.prompts import question
from codefend.victims.hf.victim import HFVictim

PROMPTS = ["what is in the picture?", "a dog", "describe it"]  # of different lengths: padding matters
TARGETS = ["a red car", "yes", "the grass and a dog"]
NAMES = [name for name in hf_tiny.FAMILIES if name != "smolvlm" or find_spec("num2words")]
every_family = pytest.mark.parametrize("name", NAMES)


@lru_cache
def victim(name: str) -> HFVictim:
    return HFVictim(*hf_tiny.build(name), name=name, max_new_tokens=3)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 40, 52, generator=torch.Generator().manual_seed(1))


@every_family
def test_contract_and_independence_of_the_batch(name: str, images: Tensor) -> None:
    v = victim(name)
    assert isinstance(v, WhiteBox)
    losses, features, answers = v.loss(images, PROMPTS, TARGETS), v.features(images), v.generate(images, PROMPTS)
    assert losses.shape == (3,)
    assert features.shape == (3, features.shape[1], 32)
    one, prompt, target = images[1:2], PROMPTS[1:2], TARGETS[1:2]  # the most padded
    assert v.loss(one, prompt, target)[0] == pytest.approx(float(losses[1]), abs=1e-4)
    assert torch.allclose(v.features(one)[0], features[1], atol=1e-4)
    assert v.generate(one, prompt) == answers[1:2]


@every_family
def test_loss_is_the_models_own(name: str) -> None:
    """Against the library from end to end: its processor, its labels. The image has the size that tiles keep."""
    draw = torch.Generator().manual_seed(3)
    v, pixels = victim(name), torch.randint(0, 256, (56, 56, 3), dtype=torch.uint8, generator=draw)
    text = question(v.processor, v.kind, PROMPTS[0])
    inputs = v.processor(images=[pixels.numpy()], text=[text], return_tensors="pt")
    inputs.pop("labels", None)
    answer = torch.tensor([v._answer(PROMPTS[0], TARGETS[0])])
    if v.model.config.get_text_config().is_encoder_decoder:
        inputs["labels"] = answer
    else:
        inputs["labels"] = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
        for key, fill in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if key in inputs:
                fill = int(name == "paligemma") if key == "token_type_ids" else fill
                tail = answer if fill is None else torch.full_like(answer, fill)
                inputs[key] = torch.cat([inputs[key], tail], 1)
    expected = float(v.model(**inputs).loss)
    ours = v.loss(pixels.permute(2, 0, 1)[None] / 255, PROMPTS[:1], TARGETS[:1])
    assert float(ours) == pytest.approx(expected, abs=2e-2)  # theirs resamples in 8 bits: up to half a level a pixel


@every_family
def test_gradients_reach_every_image_and_agree_with_differences(name: str, images: Tensor) -> None:
    v, x = victim(name), images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(v.loss(x, PROMPTS, TARGETS).sum(), x)
    norms = grad.flatten(1).norm(dim=1)
    assert (norms > 1e-3).all()
    step = 2e-2 * grad / norms.view(-1, 1, 1, 1)
    slope = v.loss(images + step, PROMPTS, TARGETS) - v.loss(images - step, PROMPTS, TARGETS)
    assert torch.allclose(slope / 4e-2, norms, rtol=0.15, atol=2e-3)
    (away,) = torch.autograd.grad(v.features(x).square().mean(), x)
    assert (away.flatten(1).norm(dim=1) > 1e-6).all()


@every_family
def test_its_own_features_guide_a_purifier(name: str, images: Tensor) -> None:
    v = victim(name)
    attacked = (images + 8 / 255 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).sign()).clamp(
        0, 1
    )
    moved = Guidance(0.5, [v.features])(attacked, images)
    before, after = (
        torch.cosine_similarity(v.features(x), v.features(attacked), dim=-1).mean() for x in (images, moved)
    )
    assert after < before


@every_family
def test_apgd_lowers_its_objective_inside_the_ball(name: str, images: Tensor) -> None:
    v, budget = victim(name), Budget(eps=8 / 255, steps=2)
    objective = objectives.targeted(v, PROMPTS, TARGETS)
    attacked = APGD(random_start=False)(objective, images, budget)
    assert float((attacked - images).abs().max()) <= budget.eps + 1e-6
    gains = objective(images) - objective(attacked)
    assert (gains >= 0).all()
    assert (gains > 1e-3).sum() >= 2  # two steps over a random network may miss once


@every_family
def test_recomputing_layers_changes_no_gradient(name: str, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    v, x = victim(name), images.clone().requires_grad_()
    plain = torch.autograd.grad(v.loss(x, PROMPTS, TARGETS).sum(), x)[0]
    again = MagicMock(side_effect=checkpoint)
    monkeypatch.setattr(module, "checkpoint", again)
    monkeypatch.setattr(v, "checkpointing", True)
    saved = torch.autograd.grad(v.loss(x, PROMPTS, TARGETS).sum(), x)[0]
    assert again.call_count >= 3  # layers of the encoder and of the language model
    assert torch.allclose(plain, saved, atol=1e-6)
    assert not any(m.training for m in v.model.modules())


@every_family
def test_saved_folders_load_again(name: str, images: Tensor, tmp_path: Path) -> None:
    v = victim(name)
    v.save(tmp_path)
    again = load(f"hf:{tmp_path}:max_new_tokens=3,device=cpu")
    assert torch.allclose(v.loss(images, PROMPTS, TARGETS), again.loss(images, PROMPTS, TARGETS), atol=1e-5)
    assert v.generate(images, PROMPTS) == again.generate(images, PROMPTS)
    assert again.max_new_tokens == 3


def test_margins_follow_the_likelihood(images: Tensor) -> None:
    v = victim("llava")
    gaps = v.margins(images, PROMPTS, TARGETS)
    assert [len(gap) for gap in gaps] == [len(v._answer(*pair)) for pair in zip(PROMPTS, TARGETS, strict=True)]
    likely = v.generate(images[:1], PROMPTS[:1])
    first = v.processor.tokenizer(likely[0], add_special_tokens=False)["input_ids"][0]
    text = v.processor.tokenizer.decode([first])
    assert float(v.margins(images[:1], PROMPTS[:1], [text])[0][0]) > -0.5  # the model's own first token leads, nearly


def test_half_precision_keeps_gradients(images: Tensor, tmp_path: Path) -> None:
    victim("qwen2_5_vl").save(tmp_path)
    half = load(f"hf:{tmp_path}:dtype=bfloat16,device=cpu,checkpoint=true")
    assert half.model.dtype == torch.bfloat16
    x = images.clone().requires_grad_()
    losses = half.loss(x, PROMPTS, TARGETS)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, victim("qwen2_5_vl").loss(images, PROMPTS, TARGETS), atol=0.1)
    assert (torch.autograd.grad(losses.sum(), x)[0].flatten(1).norm(dim=1) > 1e-3).all()


def test_a_model_spread_over_devices_keeps_its_gradients(images: Tensor, tmp_path: Path) -> None:
    """As ``device=auto`` leaves a model that is too large: hooks on each part, the language model on disk."""
    import accelerate

    whole = victim("llava")
    whole.save(tmp_path / "model")
    spread = load(f"hf:{tmp_path / 'model'}:device=cpu,max_new_tokens=3")
    parts = {f"model.{name}": "cpu" for name, _ in spread.model.model.named_children()} | {"lm_head": "cpu"}
    places = {**parts, "model.language_model": "disk"}
    how = {"main_device": "cpu", "force_hooks": True, "offload_dir": str(tmp_path / "disk")}
    accelerate.dispatch_model(spread.model, device_map=places, **how)
    assert any(p.device.type == "meta" for p in spread.model.parameters())
    gradients = []
    for v in (whole, spread):
        x = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(v.loss(x, PROMPTS, TARGETS).sum(), x)[0])
    assert torch.allclose(*gradients, atol=1e-6)
    assert spread.generate(images, PROMPTS) == whole.generate(images, PROMPTS)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_weights_keep_gradients(bits: str, images: Tensor, tmp_path: Path) -> None:
    full = victim("llava")
    full.save(tmp_path)
    small = load(f"hf:{tmp_path}:quantize={bits},device=cpu,dtype=float32")
    kinds = {type(m).__name__ for m in small.model.modules()}
    assert ("Linear8bitLt" if bits == "8bit" else "Linear4bit") in kinds
    x = images.clone().requires_grad_()
    losses = small.loss(x, PROMPTS, TARGETS)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    (true,) = torch.autograd.grad(full.loss(x, PROMPTS, TARGETS).sum(), x)
    assert torch.allclose(losses, full.loss(images, PROMPTS, TARGETS), atol=0.5)
    assert float(torch.cosine_similarity(grad.flatten(), true.flatten(), dim=0)) > 0.5


def test_layouts_of_older_checkpoints_load(images: Tensor, tmp_path: Path) -> None:
    """Most of the hub: the image processor in a separate file, named after the torchvision class."""
    v = victim("qwen2_5_vl")
    v.save(tmp_path)
    whole = json.loads((tmp_path / "processor_config.json").read_text())
    reader = whole.pop("image_processor") | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(reader | {"processor_class": "Qwen2_5_VLProcessor"}))
    (tmp_path / "processor_config.json").unlink()
    again = load(f"hf:{tmp_path}:device=cpu")
    assert torch.allclose(v.loss(images, PROMPTS, TARGETS), again.loss(images, PROMPTS, TARGETS), atol=1e-5)


def test_chat_templates_end_where_the_answer_begins() -> None:
    text = question(victim("qwen2_5_vl").processor, "qwen2_5_vl", "what?")
    assert text.endswith("what?<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|image_pad|>") == 1
    ends = {
        name: victim(name).processor.tokenizer.convert_ids_to_tokens(victim(name)._end) for name in ("llava", "gemma3")
    }
    assert ends == {"llava": ["</s>"], "gemma3": ["<|im_end|>"]}
    assert question(victim("llava").processor, "llava", "what?") == "USER: <image>\nwhat? ASSISTANT:"


USER = "{% if m['role'] == 'user' %}IMAGE{{ m['content'][1]['text'] }}<|im_end|>{% else %}"
TEMPLATES = {  # a chat template, and the tokens of the answer "a red" by it
    "a space, as SmolVLM's": (
        "{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}:{% else %}: "
        "{% endif %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}IMAGE{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        ["Ġa", "Ġre", "d"],
    ),
    "answers as plain text": (
        f"{{% for m in messages %}}{USER}{{{{ ' ' + m['content'] }}}}<|im_end|>{{% endif %}}{{% endfor %}}",
        ["Ġa", "Ġre", "d"],
    ),
    "answers as they are": (
        f"{{% for m in messages %}}{USER} {{{{ m['content'] }}}}<|im_end|>{{% endif %}}{{% endfor %}}",
        ["Ġa", "Ġre", "d"],
    ),
    "no answers": (
        f"{{% for m in messages %}}{USER}{{{{ raise_exception('one turn') }}}}{{% endif %}}{{% endfor %}}",
        ["a", "Ġre", "d"],
    ),
    "another opening": (
        f"{{% for m in messages %}}{USER} {{{{ m['content'] }}}}<|im_end|>{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        ["a", "Ġre", "d"],
    ),
    "an answer that is thought over": (
        hf_tiny.CHAT.replace("{{ c['text'] }}", "{{ '</think>' if m['role'] != 'user' }}{{ c['text'] }}"),
        ["a", "Ġre", "d"],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_tokenized_as_in_their_chat_template(name: str, images: Tensor) -> None:
    template, expected = TEMPLATES[name]
    model, processor = hf_tiny.build("idefics3")
    processor.chat_template = template.replace("IMAGE", "<image>")
    v = HFVictim(model, processor, name=name)
    *words, end = processor.tokenizer.convert_ids_to_tokens(v._answer("what?", "a red"))
    assert words == expected
    assert end == ("</s>" if name == "no answers" else "<|im_end|>")
    assert v._answer("what?", "") == v._end
    assert torch.isfinite(v.loss(images, PROMPTS, TARGETS)).all()


@every_family
def test_an_answer_continues_where_the_question_ends(name: str) -> None:
    v, tokenizer = victim(name), victim(name).processor.tokenizer
    if not v.processor.chat_template:
        assert v._answer("what?", "a red") == [*tokenizer("a red", add_special_tokens=False)["input_ids"], *v._end]
        return
    asking = [{"type": "image"}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": asking}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "a red"}]}]
    whole = tokenizer.apply_chat_template(turns, chat_template=v.processor.chat_template, tokenize=False)
    opening, answer = question(v.processor, v.kind, "what?"), v._answer("what?", "a red")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (opening, whole)]
    assert ids[1][: len(ids[0]) + len(answer)] == ids[0] + answer


def test_layouts_of_images_that_fill_their_tiles_hold_no_masks(images: Tensor) -> None:
    v = HFVictim(*hf_tiny.build("idefics3"), name="idefics3")
    text = question(v.processor, v.kind, PROMPTS[0])
    (layout,) = v._lay_out(images[:1], PROMPTS[:1])
    inputs = v.processor(images=[np.zeros((40, 52, 3), dtype=np.uint8)], text=[text], return_tensors="pt")
    assert set(layout) == set(inputs) - {"pixel_values"}
    assert all(torch.equal(value, inputs[key]) for key, value in layout.items())
    held = sum(value.untyped_storage().nbytes() for value in layout.values())
    assert held < inputs["pixel_attention_mask"].nbytes / 10


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ("device=cuda:1,dtype=bfloat16", "org/m", ("cuda:1", "bfloat16")),
        ("dtype=bfloat16,device=cuda:1", "org/m", ("cuda:1", "bfloat16")),
        ("device=cuda:1", "C:/models/m", ("cuda:1", "auto")),
        ("", "org/m", ("auto", "auto")),
    ],
)
def test_a_device_may_have_a_number(
    options: str, name: str, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = MagicMock()
    monkeypatch.setattr(loading, "load_victim", loaded)
    load(f"hf:{name}:{options}" if options else f"hf:{name}")
    source, chosen = loaded.call_args.args
    assert (source, chosen.device, chosen.dtype) == (name, *expected)


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("auto", {}, "auto"),
        ("auto", {"CODEFEND_DEVICE": "cpu"}, None),
        ("auto", {"CODEFEND_DEVICE": "cuda:1"}, "cuda:1"),
        ("auto", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda:1"),
        ("auto", {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CODEFEND_DEVICE": "cuda"}, "cuda:1"),
        ("auto", {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CODEFEND_DEVICE": "cpu"}, None),
        ("auto", {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "auto"),
        ("cuda:0", {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CODEFEND_DEVICE": "cpu"}, "cuda:0"),
        ("cpu", {"CODEFEND_DEVICE": "cuda"}, None),
    ],
)
def test_a_victim_is_on_the_configured_device(
    setting: str, environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with two GPUs."""
    for name in ("CODEFEND_DEVICE", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "device_named", lambda name, setting: torch.device(name))
    placement = loading._placement(loading.HFOptions(device=setting))
    assert placement.get("device_map") == expected
    assert placement["dtype"] == (torch.float32 if expected is None else "auto")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hf:", "name a model"),
        ("hf:./nowhere", "no such model folder"),
        ("hf:{folder}", "cannot load"),
        ("hf:{folder}:dtpye=float32", "did you mean 'dtype'"),
        ("hf:{folder}:dtype=int8", "choose one of auto, float32"),
    ],
)
def test_errors_name_the_cause(spec: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match=words):
        load(spec.format(folder=tmp_path))


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("multi_modal_projector.linear_1.weight"))
    match how:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-500])
        case "a Git LFS pointer":
            weights.write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")
        case "without a weight":
            save_file({key: value for key, value in tensors.items() if key != name}, weights, {"format": "pt"})
        case "of another size":
            save_file({**tensors, name: torch.zeros(3, 5)}, weights, {"format": "pt"})
        case "half a tokenizer":
            (folder / "tokenizer.json").write_text('{"version"')


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "its weights are cut or damaged"),
        ("a Git LFS pointer", "its weights are cut or damaged"),
        ("without a weight", "its weights lack model.multi_modal_projector.linear_1.weight"),
        ("of another size", "size of weight model.multi_modal_projector.linear_1.weight does not fit config.json"),
        ("half a tokenizer", "one of its JSON files is cut or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_a_remedy(how: str, words: str, tmp_path: Path) -> None:
    folder = hf_tiny.folder_of("llava", tmp_path / "checkpoint")
    damage(folder, how)
    with pytest.raises(CodefendError, match=f"{words}.*; download or save the checkpoint again"):
        load(f"hf:{folder}")


def test_wrong_batches_are_refused(images: Tensor) -> None:
    with pytest.raises(CodefendError, match="3 images but 2 prompts"):
        victim("llava").generate(images, PROMPTS[:2])
    with pytest.raises(ValueError, match=r"\[B,3,H,W\]"):
        victim("llava").features(torch.rand(1, 4, 8, 8))


@every_family
def test_a_soft_prefix_of_a_texts_embeddings_is_the_text(name: str, images: Tensor) -> None:
    v = victim(name)
    marks = marker(v.processor, v.kind)
    text = next(mark for mark in ("</s>", "<unk>", "<s>") if mark != marks) * 2
    (prefix,) = v.embed([text])
    prefix = prefix.clone().requires_grad_()
    if name in ("blip2_t5", "instructblip"):
        with pytest.raises(CodefendError, match="no soft prefix"):
            v.loss(images, PROMPTS, TARGETS, prefix=prefix)
        return
    written = [text + prompt for prompt in PROMPTS]
    losses = v.loss(images, PROMPTS, TARGETS, prefix=prefix)
    assert torch.allclose(losses, v.loss(images, written, TARGETS), atol=1e-5)
    assert (torch.autograd.grad(losses.sum(), prefix)[0].abs().sum(1) > 0).all()
    prompted = SoftPolicy("soft", prefix.detach(), name).attach(v)
    assert prompted.generate(images, PROMPTS) == v.generate(images, written)
    assert not torch.allclose(losses, v.loss(images, PROMPTS, TARGETS), atol=1e-3)
