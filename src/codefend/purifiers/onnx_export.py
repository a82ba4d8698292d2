"""Export a purifier as an ONNX model, checked against torch, for serving without torch."""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from codefend import purifiers
from codefend.core.files import write_atomic
from codefend.purifiers.base import NetPurifier
from codefend.types import CodefendError

OPSET = 18
TOLERANCE = 1e-4  # of a pixel in [0, 1]: a fortieth of a level
CHECKED = ((1, 16, 16), (2, 48, 80), (1, 96, 32))  # batch, height, width in multiples of the network's multiple / 16


@dataclass(frozen=True)
class Exported:
    """The exported file, and its largest difference from torch on images of several sizes."""

    path: Path
    difference: float  # in [0, 1] pixels


class _Served(nn.Module):
    """images ``[B,3,H,W]`` in [0, 1], sides multiples of the network's -> purified, the same shape."""

    def __init__(self, purifier: NetPurifier) -> None:
        super().__init__()
        self.purifier = purifier

    def forward(self, images: Tensor) -> Tensor:
        return self.purifier.denoise(images, None).clamp(0, 1)


def export_onnx(name: str | Path, out: str | Path) -> Exported:
    """Export ``bridge``, ``bridge:evaluations=2`` or a folder of weights to the file ``out`` (``.onnx``).

    Batch, height and width stay free; the caller pads and tiles, as `integrations.onnx` does. Raises CodefendError for
    a purifier without a network or with noise, a gate or guidance, for a missing package, for a file name that does not
    end in .onnx, and when the exported model differs from torch.
    """
    path = Path(out)
    if path.suffix != ".onnx":
        raise CodefendError(f"name the output *.onnx, got {path.name!r}")
    missing = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise CodefendError(f"export needs {', '.join(missing)}; install with `pip install codefend[onnx]`")
    purifier = purifiers.load(name)
    if not isinstance(purifier, NetPurifier) or purifier.stochastic:
        raise CodefendError(f"{purifier.name!r} cannot be exported: it has no network of its own, or it draws noise")
    if purifier.gate:
        raise CodefendError(f"{purifier.name!r} cannot be exported: its gate needs whole images; leave gate=true out")
    if purifier.guidance is not None:
        raise CodefendError(f"{purifier.name!r} cannot be exported: guidance takes gradients; leave guided out")
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "model.onnx"
        _write(purifier, draft)
        difference = _largest_difference(purifier, draft)
        if difference > TOLERANCE:
            raise CodefendError(f"the exported model differs from torch by {difference:.2g} of a pixel; not written")
        write_atomic(path, draft.read_bytes())
    return Exported(path, difference)


def _write(purifier: NetPurifier, path: Path) -> None:
    multiple = purifier.multiple
    free = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns that sizes are checked in Python; other sizes are run below
        torch.onnx.export(
            _Served(purifier).eval(),
            (torch.rand(2, 3, 2 * multiple, 3 * multiple),),
            str(path),
            dynamo=False,  # the newer exporter takes minutes for this network, and needs onnxscript
            input_names=["images"],
            output_names=["purified"],
            dynamic_axes={"images": free, "purified": free},
            opset_version=OPSET,
        )
    import onnx

    model = onnx.load(str(path))
    settings = {"multiple": multiple, "name": purifier.name, "evaluations": purifier.evaluations}
    onnx.helper.set_model_props(model, {"codefend": json.dumps(settings)})
    onnx.save(model, str(path))


def _largest_difference(purifier: NetPurifier, path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng, differences = np.random.default_rng(0), []
    for batch, height, width in CHECKED:
        sides = (side * purifier.multiple // 16 for side in (height, width))
        images = rng.random((batch, 3, *sides), dtype=np.float32)
        exported = session.run(None, {"images": images})[0]
        with torch.no_grad():
            expected = purifier.denoise(torch.from_numpy(images), None).clamp(0, 1)  # in float32, as exported
            differences.append(np.abs(exported - expected.numpy()).max())
    return float(max(differences))
