"""Purify a corpus: folders, Parquet files and WebDataset archives, here or in an object store.

``stores``: any fsspec file system, written whole files at a time. ``units``: the corpus as units of work, each read,
purified, written and noted in the manifest on its own. ``tars``, ``tables``, ``groups``: one kind of unit each.
``job``: which units are left. ``processes``: workers. Output and manifest of a unit are functions of its source, so
that doing a unit again after a kill, or twice at once, changes nothing.
"""

from __future__ import annotations

from codefend.purifiers.corpus.job import (
    CorpusOptions,
    CorpusReport,
    Engine,
    Tick,
    UnitPurifier,
    UnitReport,
    in_this_process,
    purify_corpus,
)
from codefend.purifiers.corpus.processes import in_processes
from codefend.purifiers.corpus.units import Unit, parse_shard

__all__ = [
    "CorpusOptions",
    "CorpusReport",
    "Engine",
    "Tick",
    "Unit",
    "UnitPurifier",
    "UnitReport",
    "in_processes",
    "in_this_process",
    "parse_shard",
    "purify_corpus",
]
