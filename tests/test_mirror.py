"""Tests mirror the tree by file name, as tests/SUBPACKAGE/test_MODULE[_PART].py; others are listed here.

Tests of the gateway mostly go through the whole server, and are named after what a client or an operator does.
"""

from __future__ import annotations

from pathlib import Path

import codefend

TESTS, ROOT = Path(__file__).parent, Path(codefend.__file__).parent
CROSSING = {  # tests of several modules at once -> what they check
    "attacks/test_text_attacks.py": "one contract of all text attacks",
    "bench/test_photographs.py": "an evaluation of photographs, from config to report",
    "bench/test_votes.py": "answers by vote, from spec to rows",
    "cli/test_refused_early.py": "every verb with a run folder",
    "contrib/attacks/test_outside.py": "registered attacks of other packages",
    "integrations/test_plugins.py": "all adapters before one upstream",
    "prompts/test_prompts_everywhere.py": "a policy in library, bench, verbs and gateway",
    "training/test_own_victim.py": "the four commands of docs/train.md",
}


def modules_of(test: Path) -> list[Path]:
    """What a test file is named after: a module or a folder in the subpackage, or the subpackage itself."""
    words = test.stem.removeprefix("test_").split("_")
    names = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
    subpackage = ROOT / test.parent.relative_to(TESTS)
    places = [place for name in names for place in (subpackage / f"{name}.py", subpackage / name)]
    return [place for place in (*places, *([subpackage] if subpackage.name == names[-1] else [])) if place.exists()]


def test_every_file_is_named_after_what_it_tests() -> None:
    files = [path for path in TESTS.rglob("test_*.py") if path.parent not in (TESTS, TESTS / "gateway")]
    strays = {path.relative_to(TESTS).as_posix() for path in files if not modules_of(path)}
    assert strays == set(CROSSING), "name the file after a module, or list it in CROSSING"
