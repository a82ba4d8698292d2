"""Load a victim from a model id or folder: dtype, device, quantization, and processors without torchvision."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from codefend.core.checkpoints import find_nonfinite
from codefend.core.devices import VARIABLE, default_device
from codefend.types import CodefendError
from codefend.victims.hf.pixels import family
from codefend.victims.hf.victim import HFVictim


@dataclass(frozen=True)
class HFOptions:
    """``device``: "cpu", "cuda:1", or "auto": the device that ``CODEFEND_DEVICE`` names, a launched process's own GPU,
    else spread over all devices (accelerate).

    Layers that fit on no accelerator stay in memory or on disk: slow, with the same gradients. Both this and the
    quantizations are tested on tiny models on a CPU (the latter where bitsandbytes is installed), not on several GPUs.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as saved; float32 on a CPU
    device: str = "auto"
    quantize: Literal["none", "8bit", "4bit"] = "none"  # bitsandbytes; gradients in the images stay
    checkpoint: bool = False  # recompute layers in the backward pass: a third slower, a fraction of the memory
    max_new_tokens: int = 48
    revision: str | None = None


def load_victim(name: str, options: HFOptions | None = None) -> HFVictim:
    """The victim of a hub id or a folder. Only safetensors are read and no code of the repository is run.

    Raises CodefendError when it cannot be loaded or is not an image-text-to-text model.
    """
    from transformers import AutoConfig

    options = options or HFOptions()
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise CodefendError(f"no such model folder: {name}")
    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    if Path(source).is_dir():
        _check_files(Path(source), name)
    extra = {} if options.revision is None else {"revision": options.revision}
    remedy = "download or save the checkpoint again" if Path(source).is_dir() else "check its name and files"
    with _failures_named(name, remedy):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **extra)
        _check_model_type(config.model_type, name)
        processor = load_processor(source, config, **extra)
        family(processor.image_processor)  # an unknown one fails before the weights are read
        model = _load_model(source, config, options, **extra)
    victim = HFVictim(model, processor, name=f"hf:{name}", max_new_tokens=options.max_new_tokens)
    victim.checkpointing = options.checkpoint
    return victim


@contextmanager
def _failures_named(name: str, remedy: str) -> Iterator[None]:
    """Turn what Transformers raises inside (OSError, ValueError, KeyError, RuntimeError and more) into one line."""
    try:
        yield
    except CodefendError:
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, SafetensorError):
            cause = f"its weights are cut or damaged ({cause})"
        elif isinstance(error, json.JSONDecodeError):
            cause = f"one of its JSON files is cut or damaged ({cause})"
        raise CodefendError(f"cannot load {name!r}: {cause}; {remedy}") from error


def _load_model(source: str, config: Any, options: HFOptions, **extra: Any) -> Any:
    """The model. Raises ValueError for weights that are not finite, and for those that Transformers would leave at
    random values, with a warning.
    """
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        source,
        config=config,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report
        **_placement(options),
        **extra,
    )
    model, report = loaded
    misfits = sorted(key for key, *_ in report["mismatched_keys"])
    if misfits:
        raise ValueError(f"the size of weight {misfits[0]} does not fit config.json")
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"its weights lack {missing[0]}" + (f" and {len(missing) - 1} others" * (len(missing) > 1)))
    if name := find_nonfinite(dict(model.named_parameters())):
        raise ValueError(f"weight {name} holds NaN or infinity")
    return model


def _check_files(folder: Path, name: str) -> None:
    """Raise CodefendError naming a file that a checkpoint folder lacks, and how to write it."""
    required = (
        (("config.json",), "it is not a Transformers checkpoint"),
        (("processor_config.json", "preprocessor_config.json"), "save the model's processor there, too"),
        (("tokenizer*", "vocab*", "*.model"), "save the model's tokenizer there, too"),
        (("*.safetensors",), "save the model with save_pretrained"),
    )
    for patterns, remedy in required:
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            raise CodefendError(f"cannot load {name!r}: the folder has no {' or '.join(patterns)}; {remedy}")


def _check_model_type(model_type: str, name: str) -> None:
    """Raise CodefendError for a model that does not answer texts about images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise CodefendError(
            f"cannot load {name!r}: {model_type!r} is no image-text-to-text model; "
            "give one such as LLaVA, Qwen-VL or SmolVLM"
        )


def _placement(options: HFOptions) -> dict[str, Any]:
    device = _device(options.device)
    gpu = torch.cuda.is_available() and device != "cpu"
    dtype: Any = getattr(torch, options.dtype) if options.dtype != "auto" else ("auto" if gpu else torch.float32)
    placement: dict[str, Any] = {"dtype": dtype}
    plain_cpu = device == "cpu" and options.quantize == "none"  # needs no accelerate
    if gpu or (device != "auto" and not plain_cpu):
        placement["device_map"] = device
    if options.quantize != "none":
        if find_spec("bitsandbytes") is None:
            raise CodefendError("quantized victims need bitsandbytes; install it with `pip install bitsandbytes`")
        from transformers import BitsAndBytesConfig

        if options.dtype == "auto":  # the kernels' own: 8-bit ones compute in float16
            dtype = torch.float16 if options.quantize == "8bit" else torch.bfloat16
            placement["dtype"] = dtype
        placement["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.quantize == "8bit",
            load_in_4bit=options.quantize == "4bit",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type="nf4",
        )
    return placement


def _device(name: str) -> str:
    """Resolve "auto": one device where it is configured or other processes use the others, else "auto"."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if name != "auto" or not (launched or os.environ.get(VARIABLE)):
        return name
    device = default_device()
    if launched and device == torch.device("cuda"):
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"  # as accelerate chooses
    return str(device)


def load_processor(source: str, config: Any, **extra: Any) -> Any:
    """The model's processor around its Pillow image processor, with or without torchvision.

    Processors that also read videos require a video processor, and that requires torchvision. Victims read images, so
    a video processor that reads nothing takes its place.
    """
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    # Looked up by the config's class; the library loads ids whose processor class only their files name.
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False, **extra)
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", **extra)
        return processor
    saved, _ = kind.get_processor_dict(source, **extra)
    parts = [_part(kind, name, source, **extra) for name in kind.get_attributes()]
    return images_only(kind).from_args_and_dict(parts, saved)


def _part(kind: Any, name: str, source: str, **extra: Any) -> Any:
    from transformers import AutoImageProcessor

    if "tokenizer" in name:
        return kind._load_tokenizer_from_pretrained(name, source, **extra)
    if name == "image_processor":
        return AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False, **extra)
    if name == "video_processor":
        return no_videos()
    raise CodefendError(f"{kind.__name__} needs a {name}, which victims of images do not have")


def images_only(kind: Any) -> Any:
    """The processor class ``kind``, which accepts `no_videos` as its video processor."""

    def check(self: Any, name: str, part: Any) -> Any:
        return type(part) if name == "video_processor" else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__module__": kind.__module__})


def no_videos() -> Any:
    """A video processor that reads nothing."""
    from transformers.video_processing_utils import VideoProcessorMixin

    return VideoProcessorMixin()
