"""Tiny random checkpoints of the real Transformers classes, written to a folder without a network."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from codefend.victims.hf.loading import images_only, no_videos

tf: Any = import_module("transformers")  # its classes are typed too narrowly for keyword dicts

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "what is in the picture? a red car and a dog on the grass. describe it, yes or no.",
    "Question: Answer: 0123456789",
]
MARKS = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
LLM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@lru_cache
def alphabet() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    initial = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=MARKS, initial_alphabet=initial, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return str(tokenizer.to_str())


def tokenizer(**tokens: str) -> Any:
    """A byte-level BPE of 320 tokens and any marks that a family adds, each also an attribute (``image_token``)."""
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    grammar = Tokenizer.from_str(alphabet())
    return tf.PreTrainedTokenizerFast(tokenizer_object=grammar, extra_special_tokens=tokens, **named)


def _pil(module: str, name: str) -> Any:
    return getattr(
        import_module(f"transformers.models.{module}.image_processing_pil_{module}"), f"{name}ImageProcessorPil"
    )


def _size(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


ModelAndProcessor = tuple[Any, Any]


def llava() -> ModelAndProcessor:
    words = tokenizer(image_token="<image>")
    eye = tf.CLIPVisionConfig(**EYE, image_size=28, patch_size=14, projection_dim=32)
    config = tf.LlavaConfig(
        vision_config=eye, text_config=tf.LlamaConfig(**LLM, **IDS, vocab_size=len(words)), image_token_index=6
    )
    reader = _pil("clip", "CLIP")(size={"shortest_edge": 28}, crop_size=_size(28))
    processor = tf.LlavaProcessor(
        reader, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return tf.LlavaForConditionalGeneration(config), processor


def llava_onevision() -> ModelAndProcessor:
    words = tokenizer(image_token="<image>", video_token="<video>")
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    eye = tf.SiglipVisionConfig(**EYE, image_size=28, patch_size=14, vision_use_head=False)
    config = tf.LlavaOnevisionConfig(
        vision_config=eye,
        text_config=tf.Qwen2Config(**LLM, **IDS, vocab_size=len(words)),
        image_token_index=6,
        video_token_index=7,
        image_grid_pinpoints=grid,
    )
    reader = _pil("llava_onevision", "LlavaOnevision")(size=_size(28), image_grid_pinpoints=grid)
    processor = images_only(tf.LlavaOnevisionProcessor)(
        reader,
        words,
        no_videos(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(version: str) -> ModelAndProcessor:
    words = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    ids = {
        f"{key}_token_id": words.convert_tokens_to_ids(f"<|{mark}|>")
        for key, mark in [("image", "image_pad"), ("video", "video_pad")]
        + [(f"vision_{end}", f"vision_{end}") for end in ("start", "end")]
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    if version == "3":
        rope["mrope_interleaved"] = True
    text = {**LLM, **IDS, "vocab_size": len(words), "rope_parameters": rope}
    eye: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
    }
    patch = 14 if version == "2_5" else 16
    if version == "2_5":
        eye |= {"patch_size": patch, "window_size": 56, "fullatt_block_indexes": [1]}
        config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=eye, **ids)
    else:
        eye |= {"patch_size": patch, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        config = tf.Qwen3VLConfig(text_config={**text, "head_dim": 8}, vision_config=eye, **ids)
    pixels = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
    reader = _pil("qwen2_vl", "Qwen2VL")(patch_size=patch, size=pixels)
    kind = images_only(tf.Qwen2_5_VLProcessor if version == "2_5" else tf.Qwen3VLProcessor)
    model = tf.Qwen2_5_VLForConditionalGeneration if version == "2_5" else tf.Qwen3VLForConditionalGeneration
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return model(config), kind(reader, words, no_videos(), chat_template=chat)


def qwen2_5_vl() -> ModelAndProcessor:
    return _qwen("2_5")


def qwen3_vl() -> ModelAndProcessor:
    return _qwen("3")


def _idefics(prefix: str) -> ModelAndProcessor:
    words = tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    words.add_tokens([f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)], special_tokens=True)
    config = getattr(tf, f"{prefix}Config")(
        vision_config={**EYE, "image_size": 28, "patch_size": 7},
        text_config=tf.LlamaConfig(**LLM, **IDS, vocab_size=len(words)),
        image_token_id=6,
        scale_factor=2,
    )
    home = "smolvlm" if prefix == "SmolVLM" else "idefics3"
    reader = _pil(home, prefix)(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    chat = CHAT.replace("IMAGE", "<image>").replace("<|im_end|>", "<end_of_utterance>")
    videos = [no_videos()] if prefix == "SmolVLM" else []
    processor = images_only(getattr(tf, f"{prefix}Processor"))(
        reader, words, *videos, image_seq_len=4, chat_template=chat
    )
    return getattr(tf, f"{prefix}ForConditionalGeneration")(config), processor


def idefics3() -> ModelAndProcessor:
    return _idefics("Idefics3")


def smolvlm() -> ModelAndProcessor:
    return _idefics("SmolVLM")


def internvl() -> ModelAndProcessor:
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = tf.InternVLConfig(
        vision_config={**EYE, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=tf.Qwen2Config(**LLM, **IDS, vocab_size=len(words)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    reader = _pil("got_ocr2", "GotOcr2")(size=_size(28), max_patches=4)
    chat = CHAT.replace("IMAGE", "<IMG_CONTEXT>")
    processor = images_only(tf.InternVLProcessor)(reader, words, no_videos(), image_seq_length=4, chat_template=chat)
    return tf.InternVLForConditionalGeneration(config), processor


def _blip(prefix: str, text: Any, words: Any) -> Any:
    eye = {**EYE, "image_size": 28, "patch_size": 14, "initializer_range": 0.02}
    query = {**EYE, "vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 128}
    return getattr(tf, f"{prefix}Config")(
        vision_config=eye, qformer_config=query, text_config=text, num_query_tokens=4, image_token_index=6
    )


def _opt(words: Any) -> Any:
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.OPTConfig(**shape, **IDS, vocab_size=len(words), word_embed_proj_dim=32, max_position_embeddings=512)


def blip2() -> ModelAndProcessor:
    words = tokenizer()
    reader = _pil("blip", "Blip")(size=_size(28))
    return tf.Blip2ForConditionalGeneration(_blip("Blip2", _opt(words), words)), tf.Blip2Processor(reader, words, 4)


def blip2_t5() -> ModelAndProcessor:
    words = tokenizer()
    text = tf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=len(words), decoder_start_token_id=0, **IDS
    )
    reader = _pil("blip", "Blip")(size=_size(28))
    return tf.Blip2ForConditionalGeneration(_blip("Blip2", text, words)), tf.Blip2Processor(reader, words, 4)


def instructblip() -> ModelAndProcessor:
    words = tokenizer()
    reader = _pil("blip", "Blip")(size=_size(28))
    config = _blip("InstructBlip", _opt(words), words)
    processor = tf.InstructBlipProcessor(reader, words, tokenizer(), num_query_tokens=4)
    return tf.InstructBlipForConditionalGeneration(config), processor


def paligemma() -> ModelAndProcessor:
    words = tokenizer(image_token="<image>")
    reader = _pil("siglip", "Siglip")(size=_size(28))
    reader.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(reader, words)
    text = {**LLM, **IDS, "model_type": "gemma", "vocab_size": len(words), "head_dim": 8}
    config = tf.PaliGemmaConfig(
        vision_config={
            **EYE,
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config=text,
        image_token_index=6,
        projection_dim=32,
        hidden_size=32,
        vocab_size=len(words),
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> ModelAndProcessor:
    words = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    config = tf.Gemma3Config(
        text_config={**LLM, **IDS, "vocab_size": len(words), "head_dim": 8, "sliding_window": 64},
        vision_config={**EYE, "image_size": 28, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
    )
    reader = _pil("gemma3", "Gemma3")(size=_size(28))
    chat = CHAT.replace("IMAGE", "<start_of_image>")
    processor = tf.Gemma3Processor(reader, words, chat_template=chat, image_seq_length=4)
    return tf.Gemma3ForConditionalGeneration(config), processor


FAMILIES = {
    make.__name__: make
    for make in (
        llava,
        llava_onevision,
        qwen2_5_vl,
        qwen3_vl,
        idefics3,
        smolvlm,
        internvl,
        blip2,
        blip2_t5,
        instructblip,
        paligemma,
        gemma3,
    )
}


def build(name: str) -> ModelAndProcessor:
    """The family's model and processor with weights ten times the usual spread, so that pixels matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = FAMILIES[name]()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.ndim > 1 or "query" in key:
                    weight.normal_(std=0.15)
    return model.float().eval(), processor


def folder_of(name: str, root: Path) -> Path:
    """The family saved as `codefend.victims.hf` would save a victim."""
    from codefend.victims.hf.victim import HFVictim

    folder = root / name
    HFVictim(*build(name), name=name).save(folder)
    return folder
