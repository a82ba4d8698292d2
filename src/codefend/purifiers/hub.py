"""The network as a model of `diffusers`: `from_pretrained`, `save_pretrained`, `push_to_hub`, safetensors, card.

Importing this module imports diffusers. ``hub:ID_OR_FOLDER`` among the purifiers loads what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from codefend.core.files import write_atomic
from codefend.purifiers.base import Purifier
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net
from codefend.types import CodefendError

PREFIX = "hub:"
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
tags: [adversarial-robustness, image-purification, codefend]
---
# CoDefend {kind}

A residual U-Net of {millions:.2f} M parameters that takes adversarial perturbations out of pictures before a multimodal
model sees them. Images `[B, 3, H, W]` in [0, 1] in, the same out; any size.

```python
import codefend
purifier = codefend.load_purifier("hub:THIS_REPOSITORY")  # or codefend serve --purifier hub:THIS_REPOSITORY
purified = purifier(images)
```
Network: {net}. Defaults: {options}.

An attacker who sees the purifier can attack through it: measure that, too (`codefend eval`).
"""


class PurifierModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """``(images [B,3,H,W], s [B], sigma [B]) -> [B,3,H,W]``: a `PurifierNet` with what it is and its defaults.

    ``kind`` is "prior" or "bridge", ``net`` the fields of a `NetConfig`, ``options`` the purifier's defaults,
    ``detector`` those of a `Detector` if one was calibrated.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        kind: str = "bridge",
        net: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        detector: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = PurifierNet(NetConfig.from_dict(net or {}))

    @classmethod
    def wrap(
        cls,
        net: PurifierNet,
        *,
        kind: str,
        options: Mapping[str, Any] | None = None,
        detector: Mapping[str, Any] | None = None,
    ) -> PurifierModel:
        """The same network, not a copy."""
        shape = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(net.config).items()}
        found = dict(detector) if detector else None
        model: PurifierModel = cls(kind=kind, net=shape, options=dict(options or {}), detector=found)
        model.network = net
        return model

    @classmethod
    def from_weights(cls, folder: str | Path) -> PurifierModel:
        """From a folder that this project's trainings write. Raises CodefendError as `nets.load_net`."""
        net, meta = load_net(folder)
        return cls.wrap(net, kind=meta["kind"], options=meta.get("options"), detector=meta.get("detector"))

    def forward(self, images: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        clean: Tensor = self.network(images, s, sigma)
        return clean

    def purifier(self, *, name: str = "", **settings: object) -> Purifier:
        """The images-in, images-out object around this network. Raises CodefendError for an unknown option."""
        from codefend.purifiers import wrap_net

        meta = {
            "kind": self.config.kind,
            "options": dict(self.config.options or {}),
            "detector": self.config.get("detector"),
        }
        return wrap_net(self.network.eval(), meta, settings, name=name or self.config.kind)

    def card(self) -> str:
        """The model card in Markdown, with the front matter that the hub reads."""
        millions = sum(p.numel() for p in self.network.parameters()) / 1e6
        return CARD.format(
            kind=self.config.kind, millions=millions, net=dict(self.config.net or {}), options=self.config.options or {}
        )

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As diffusers does it, with the card beside."""
        super().save_pretrained(save_directory, **options)
        write_atomic(Path(save_directory) / "README.md", self.card())

    def _upload_folder(self, working_dir: str | Path, repo_id: str, **options: Any) -> Any:
        write_atomic(Path(working_dir) / "README.md", self.card())  # over the library's empty one
        return super()._upload_folder(working_dir, repo_id, **options)


def build_hub(name: str, settings: Mapping[str, object]) -> Purifier:
    """``hub:ID_OR_FOLDER``. Raises CodefendError when it cannot be had, or holds something else."""
    source = name.removeprefix(PREFIX)
    if not source:
        raise CodefendError(f"name a repository or folder, as in {PREFIX}user/bridge")
    place = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not place.is_dir():
        raise CodefendError(f"no such model folder: {source}")
    try:
        model = PurifierModel.from_pretrained(str(place) if place.is_dir() else source, use_safetensors=True)
    except Exception as error:  # OSError, ValueError and more
        raise CodefendError(f"cannot load {source!r}: {str(error).strip().splitlines()[0]}") from error
    model.requires_grad_(False)
    purifier: Purifier = model.purifier(name=name, **settings)
    return purifier
