"""Prompt search: attacked examples (``bank``), the search for a policy, and the table of purifiers x policies.

``soft`` and ``generator`` train learned policies, ``codefend.prompts.gepa_search`` searches text. This module imports
no torch, so that configs can be listed quickly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from codefend.training.prompt_search.bank import SearchLoaders
    from codefend.training.prompt_search.config import SearchConfig
    from codefend.training.prompt_search.search import SearchResult

__all__ = ["optimize_prompt"]


def optimize_prompt(config: SearchConfig, folder: str | Path, *, loaders: SearchLoaders | None = None) -> SearchResult:
    """Search a prompt policy for ``config.victim`` into ``folder``; the same call resumes after a kill.

    ``loaders`` replaces the look-up of victims, tasks and purifiers by name. Raises CodefendError for unknown names, a
    folder made with another config, a victim that keeps failing, or a method that the victim does not support.
    """
    from codefend.training.prompt_search.search import run_search

    return run_search(config, Path(folder), loaders)
