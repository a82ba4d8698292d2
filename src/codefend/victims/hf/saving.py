"""Write a victim's model and processor as a folder that ``hf:FOLDER`` loads again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from codefend.core.files import write_atomic
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.victims.hf.victim import HFVictim

PROCESSOR_FILE = "processor_config.json"


def save_victim(victim: HFVictim, folder: Path) -> None:
    """Safetensors, configs, tokenizer and processor. Raises CodefendError when the folder cannot be written.

    The stand-in for a video processor is left out: victims read no videos.
    """
    try:
        victim.model.save_pretrained(folder)
        victim.processor.save_pretrained(folder)
        path = folder / PROCESSOR_FILE
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CodefendError(f"cannot write {folder}: {error}") from error
    saved.pop("video_processor", None)
    write_atomic(path, json.dumps(saved, indent=2) + "\n")
