"""Purifiers on the Hugging Face Hub: download, upload, and the model card.

`huggingface_hub` is imported when one of these functions needs it: its own mixin would be imported with every purifier,
which costs a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from codefend.core.assets import needs
from codefend.core.files import write_atomic
from codefend.purifiers import load_folder
from codefend.purifiers.nets import PurifierNet, save_net
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.purifiers.base import NetPurifier, Purifier

PREFIX = "hub:"
FILES = ["config.json", "*.safetensors", "README.md"]
CARD = """---
license: apache-2.0
library_name: codefend
pipeline_tag: image-to-image
tags: [adversarial-robustness, image-purification, codefend]
---
# CoDefend {kind}

A network of {millions:.2f} M parameters that removes adversarial perturbations from images before a multimodal model
sees them. Images `[B, 3, H, W]` in [0, 1] in, the same out; any size.

```python
import codefend
purifier = codefend.load_purifier("hub:THIS_REPOSITORY")  # or codefend serve --purifier hub:THIS_REPOSITORY
purified = purifier(images)
```
Network: {net}. Defaults: {options}.

An attacker who knows the purifier can attack through it: evaluate adaptive attacks too (`codefend eval`).
"""


def build_hub(name: str, settings: Mapping[str, object]) -> Purifier:
    """``hub:ID_OR_FOLDER``. Raises CodefendError when it cannot be loaded."""
    source = name.removeprefix(PREFIX)
    if not source:
        raise CodefendError(f"name a repository or folder, as in {PREFIX}user/bridge")
    return load_folder(find_folder(source), settings, name=name)


def find_folder(source: str | Path, **options: Any) -> Path:
    """``source`` if it is a folder, else the downloaded snapshot of the repository of that id.

    ``options`` are those of `huggingface_hub.snapshot_download` (revision, cache_dir, token, ...). Raises CodefendError
    for a missing folder, a failed download and a missing package.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if str(source).startswith((".", "/", "~")):
        raise CodefendError(f"no such model folder: {source}")
    hub = _require()
    try:
        return Path(hub.snapshot_download(str(source), allow_patterns=FILES, **options))
    except Exception as error:  # OSError, ValueError and the library's own
        raise CodefendError(f"cannot load {str(source)!r}: {str(error).strip().splitlines()[0]}") from error


def save(purifier: NetPurifier, folder: str | Path) -> None:
    """Write config.json, model.safetensors (float32) and README.md. Raises CodefendError for a network of diffusers."""
    net = purifier.net
    if not isinstance(net, PurifierNet):
        raise CodefendError(f"{purifier.name} has a network of another library: save that with diffusers")
    options = asdict(purifier.options)
    detector = None if purifier.detector is None else purifier.detector.to_dict()
    save_net(folder, net, kind=purifier.kind, options=options, detector=detector)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    card = CARD.format(kind=purifier.kind, millions=millions, net=asdict(net.config), options=options)
    write_atomic(Path(folder) / "README.md", card)


def push(purifier: NetPurifier, repo_id: str, *, private: bool | None, token: str | None, **commit: Any) -> str:
    """Create the repository if need be, upload what `save` writes, and return the commit's address."""
    hub = _require()
    api = hub.HfApi(token=token)
    with TemporaryDirectory() as folder:
        save(purifier, folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))


def _require() -> Any:
    with needs("the Hugging Face Hub", "hub"):
        import huggingface_hub
    return huggingface_hub
