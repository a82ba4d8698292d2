"""Write a purifier as an ONNX model, checked against torch, for serving where torch is not installed."""

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
from codefend.purifiers.base import NetPurifier
from codefend.runs import write_atomic
from codefend.types import UserError

OPSET = 18
TOLERANCE = 1e-4  # of a pixel in [0, 1]: a fortieth of a level
LARGEST = 8192  # pixels a side; tiles are smaller
CHECKED = ((1, 16, 16), (2, 48, 80), (1, 96, 32))  # batch, height, width in multiples of the network's multiple / 16


@dataclass(frozen=True)
class Exported:
    """Where the model lies and how far it was from torch on pictures of several sizes."""

    path: Path
    difference: float  # largest, pixels in [0, 1]


class _Served(nn.Module):
    """images ``[B,3,H,W]`` in [0, 1], sides multiples of the network's -> purified, the same shape."""

    def __init__(self, purifier: NetPurifier) -> None:
        super().__init__()
        self.purifier, self.net = purifier, purifier.net  # the network as a submodule, so that its weights are written

    def forward(self, images: Tensor) -> Tensor:
        return self.purifier.denoise(images, None).clamp(0, 1)


def export_onnx(name: str | Path, out: str | Path) -> Exported:
    """Export ``bridge``, ``bridge:evaluations=2`` or a folder of weights to the file ``out`` (``.onnx``).

    Batch, height and width stay free. Padding and tiles are the caller's (`integrations.onnx_purifier` does both).
    Raises UserError for a purifier without a network or with noise, a missing package, a name that does not end in
    .onnx, or when the exported model differs from torch.
    """
    path = Path(out)
    if path.suffix != ".onnx":
        raise UserError(f"name the output *.onnx, got {path.name!r}")
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if missing:
        raise UserError(f"export needs {', '.join(missing)}; install with `pip install codefend[onnx]`")
    purifier = purifiers.load(name)
    if not isinstance(purifier, NetPurifier) or purifier.stochastic:
        raise UserError(f"{purifier.name!r} cannot be exported: it has no network of its own, or it draws noise")
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "model.onnx"
        _write(purifier, draft)
        difference = _largest_difference(purifier, draft)
        if difference > TOLERANCE:
            raise UserError(f"the exported model differs from torch by {difference:.2g} of a pixel; not written")
        write_atomic(path, draft.read_bytes())
    return Exported(path, difference)


def _write(purifier: NetPurifier, path: Path) -> None:
    from torch.export import Dim

    multiple = purifier.multiple
    height, width = (multiple * Dim(side, min=1, max=LARGEST // multiple) for side in ("rows", "columns"))
    example = torch.rand(2, 3, 2 * multiple, 3 * multiple)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own insides
        program = torch.onnx.export(
            _Served(purifier).eval(),
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["purified"],
            dynamic_shapes=({0: Dim("batch"), 2: height, 3: width},),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    settings = {"multiple": multiple, "name": purifier.name, "evaluations": purifier.evaluations}
    program.model.metadata_props["codefend"] = json.dumps(settings)
    program.save(str(path), external_data=False)


def _largest_difference(purifier: NetPurifier, path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng, differences = np.random.default_rng(0), []
    for batch, height, width in CHECKED:
        sides = (side * purifier.multiple // 16 for side in (height, width))
        images = rng.random((batch, 3, *sides), dtype=np.float32)
        seen = session.run(None, {"images": images})[0]
        with torch.no_grad():
            differences.append(np.abs(seen - purifier(torch.from_numpy(images)).numpy()).max())
    return float(max(differences))
