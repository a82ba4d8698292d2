"""The journeys of the prompt side: attacked examples (``bank``), the search for a policy, the collaboration table.

The optimizers themselves are in ``codefend.prompts``; here they meet victims, tasks, attacks and purifiers. This module
imports no torch, so that configs can be listed quickly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from codefend.training.prompt_search.bank import Sources
    from codefend.training.prompt_search.config import SearchConfig
    from codefend.training.prompt_search.search import Outcome

__all__ = ["optimize_prompt"]


def optimize_prompt(config: SearchConfig, folder: str | Path, *, sources: Sources | None = None) -> Outcome:
    """Search a prompt policy for ``config.victim`` into ``folder``; the same call resumes after a kill.

    ``sources`` replaces the look-up of victims, tasks and purifiers by name. Raises CodefendError for unknown names, a
    folder made with another config, a victim that keeps failing, or a method that the victim does not allow.
    """
    from codefend.training.prompt_search.search import run_search

    return run_search(config, Path(folder), sources)
