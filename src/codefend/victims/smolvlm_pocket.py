"""The victim ``smolvlm-pocket``: SmolVLM's architecture at pocket size, in Transformers' own classes.

`Idefics3ForConditionalGeneration` (Laurençon et al. 2024), the class of SmolVLM-256M (Marafioti et al. 2025), with the
same language model, SmolLM2-135M-Instruct. The vision tower is a small ViT with 16-pixel patches at 128 pixels: 64
patches, merged two by two into 16 image tokens. A weights folder holds the trained part: vision tower, connector, two
token embeddings and LoRA adapters. `build_checkpoint` adds the language model and writes a complete checkpoint, which
Transformers loads without CoDefend.

Shape legend: B batch, T image tokens (16), D the language model's width (576).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from codefend.core.checkpoints import load_weights
from codefend.types import CodefendError
from codefend.victims.answers import default_cache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from codefend.victims.hf.victim import HFVictim

NAME = "smolvlm-pocket"
SIDE, PATCH, SCALE = 128, 16, 2  # pixels, pixels, patches per image token in each direction
TOKENS = (SIDE // PATCH // SCALE) ** 2
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
MEAN = STD = 0.5  # SigLIP's normalization
# Tokens that Idefics3's processor writes, after SmolLM2's own. The first two have trained embeddings.
SPECIAL_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<image>")
SPECIAL = "marks"  # the trained embeddings' name in a weights folder
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CARD_METADATA = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [adversarial-robustness, codefend]
---
"""
LORA_SCALE = 2.0  # lora_alpha / rank, as in `victims.pocket`
ADAPTERS = "lora."  # start of the adapters' names in a weights folder
VERSION = 1  # of the checkpoints that `build_checkpoint` writes; the cache holds one folder for each

State = Mapping[str, Tensor]


class VisionTower(nn.Module):
    """The vision tower and the connector under Transformers' names, without a language model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.idefics3 import modeling_idefics3 as idefics3

        config.vision_config._attn_implementation = "sdpa"
        self.vision_model = idefics3.Idefics3VisionTransformer(config.vision_config)
        self.connector = idefics3.Idefics3Connector(config)

    def forward(self, images: Tensor) -> Tensor:
        """Image tokens ``[B, T, D]`` of images ``[B, 3, 128, 128]`` in [0, 1]."""
        hidden = self.vision_model((images - MEAN) / STD).last_hidden_state
        tokens: Tensor = self.connector(hidden)
        return tokens


def architecture(text: Any, vision: Mapping[str, int] = VISION) -> Any:
    """The Idefics3 config around a LlamaConfig; the vocabulary grows by SPECIAL_TOKENS."""
    from transformers import Idefics3Config, LlamaConfig

    fields = {**text.to_dict(), "vocab_size": text.vocab_size + len(SPECIAL_TOKENS)}
    return Idefics3Config(
        vision_config={**vision, "image_size": SIDE, "patch_size": PATCH},
        text_config=LlamaConfig(**fields),
        scale_factor=SCALE,
        image_token_id=text.vocab_size + SPECIAL_TOKENS.index("<image>"),
        tie_word_embeddings=True,
    )


# --- weights and checkpoints -----------------------------------------------------------------------------------------


def is_weights(folder: Path) -> bool:
    """Whether the folder's config says that it holds weights of this victim."""
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["kind"] == NAME)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors (float32) of a weights folder. Raises CodefendError when it holds none,
    and for weights that are not finite."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["kind"]
        state = load_weights(folder / "model.safetensors")
    except CodefendError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CodefendError(
            f"{folder} holds no {NAME} weights ({error}); train some with `codefend train {NAME} --run DIR`"
        ) from error
    if kind != NAME:
        raise CodefendError(f"{folder} holds weights of {kind!r}; give a folder of {NAME} weights")
    return config, state


def build_checkpoint(weights: Path, folder: Path) -> Path:
    """Write the complete checkpoint of the weights folder ``weights`` into ``folder``, which must be new or empty.

    The folder is written atomically. Raises CodefendError when it is not empty or cannot be written, or when the
    weights or the language model's package are missing.
    """
    from codefend.victims.smollm import load_smollm

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CodefendError(f"{folder} is not empty; give a new folder")
    config, state = read_weights(weights)
    llm, tokenizer = load_smollm()
    try:
        model = assemble(llm, state, config["vision"])
    except (KeyError, RuntimeError) as error:
        raise CodefendError(f"the weights in {weights} do not fit this version of {NAME}; train it again") from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:60]}.") as temporary:
            checkpoint = Path(temporary) / "checkpoint"
            model.save_pretrained(checkpoint)
            build_processor(tokenizer).save_pretrained(checkpoint)
            card = weights / "README.md"
            text = card.read_text(encoding="utf-8") if card.is_file() else f"# {NAME}\n"
            (checkpoint / "README.md").write_text(CARD_METADATA + text, encoding="utf-8")
            checkpoint.replace(folder)
    except OSError as error:
        raise CodefendError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def cached_checkpoint(weights: Path) -> Path:
    """The checkpoint of a weights folder in the user's cache, built on first use; errors as `build_checkpoint`."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for name in ("config.json", "model.safetensors"):
        path = weights / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    folder = default_cache().parent / "victims" / f"{NAME}-{digest.hexdigest()[:16]}"
    if not (folder / "config.json").is_file():
        try:
            build_checkpoint(weights, folder)
        except CodefendError:
            if not (folder / "config.json").is_file():  # otherwise another process has built it meanwhile
                raise
    return folder


def load_smolvlm(weights: Path) -> HFVictim:
    """The victim of a weights folder, by the same code as any ``hf:`` victim; errors as `build_checkpoint`."""
    from codefend.victims.hf.loading import load_victim

    folder = cached_checkpoint(weights)
    try:
        victim = load_victim(str(folder))
    except CodefendError as error:
        raise CodefendError(f"{error}: remove {folder}, and the next call builds it") from error
    victim.name = NAME
    return victim


# --- assembly --------------------------------------------------------------------------------------------------------


def assemble(llm: Any, state: State, vision: Mapping[str, int] = VISION) -> Any:
    """`Idefics3ForConditionalGeneration` from a LlamaForCausalLM (without adapters) and the trained tensors."""
    from transformers import GenerationConfig, Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration(architecture(llm.config, vision))
    text = merge_adapters(dict(llm.model.state_dict()), state)
    table = text["embed_tokens.weight"]
    rows = torch.zeros(len(SPECIAL_TOKENS), table.shape[1])
    rows[: len(state[SPECIAL])] = state[SPECIAL]
    text["embed_tokens.weight"] = torch.cat([table, rows])
    tensors = {f"model.text_model.{name}": value for name, value in text.items()}
    tensors |= {f"model.{name}": v for name, v in state.items() if name.startswith(("vision_model.", "connector."))}
    tensors["lm_head.weight"] = text["embed_tokens.weight"]
    model.load_state_dict(tensors)
    model.tie_weights()
    ids = {key: getattr(llm.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=48)
    return model.eval()


def merge_adapters(text: Mapping[str, Tensor], state: State) -> dict[str, Tensor]:
    """The language model's weights ``text`` plus the products of the adapters ``lora.NAME.{A,B}`` of ``state``."""
    merged = dict(text)
    for key, down in state.items():
        if key.startswith(ADAPTERS) and key.endswith(".A"):
            name = key.removeprefix(ADAPTERS).removesuffix(".A")
            up = state[f"{ADAPTERS}{name}.B"]
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + LORA_SCALE * up @ down
    return merged


def build_processor(tokenizer: Tokenizer) -> Any:
    """Idefics3's processor around a tokenizer of `tokenizers`: no tiles, one view of 128 x 128 pixels."""
    from transformers import Idefics3Processor, PreTrainedTokenizerFast
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
    )
    size = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(
        size=size, max_image_size=size, do_image_splitting=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return Idefics3Processor(images, fast, image_seq_len=TOKENS, chat_template=CHAT_TEMPLATE)
