"""Write the goldens anew: ``python tests/goldens/make.py [AREA ...]``; without areas all of them, minutes.

Only for a behaviour that changes on purpose, and then only its area; the diff of ``data/`` is what changed, and the
commit says why. A refactoring never runs this: what it would write is what it has broken.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from goldens import evaluate, gateway, kit, prompts, purify, surface, train


def purified(_: Path) -> None:
    records, arrays = purify.purified()
    kit.save("purified", {"machine": kit.machine(), "images": records})
    kit.save_arrays("purified", arrays)


def evaluation(place: Path) -> None:
    evaluate.whole(place)
    evaluate.keep_old_run(place / "run")


AREAS = {
    "purified": purified,
    "gradient": lambda _: kit.save("gradient", purify.gradient()),
    "folder_job": lambda place: kit.save("folder_job", purify.folder_job(place)),
    "bridge": lambda place: kit.save("bridge", train.bridge(place)),
    "prior": lambda place: kit.save("prior", train.prior(place)),
    "pairs": lambda place: kit.save("pairs", train.pairs(place)),
    "mined": lambda place: kit.save("mined", train.mined(place)),
    "peers": lambda place: kit.save("peers", train.peers(place)),
    "pocket": lambda place: kit.save("pocket", train.pocket(place)),
    "evaluation": evaluation,
    "attacks": lambda place: kit.save("attacks", evaluate.attacks(place)),
    "report": lambda place: kit.save("report", evaluate.report(place)),
    "written": lambda _: kit.save("written", prompts.written()),
    "rewritten": lambda _: kit.save("rewritten", prompts.rewritten()),
    "generated": lambda _: kit.save("generated", prompts.generated()),
    "answered": lambda _: kit.save("answered", prompts.answered()),
    "gateway": lambda _: kit.save("gateway", {"machine": kit.machine(), **gateway.transcript()}),
    "front": lambda _: kit.save("front", surface.front()),
    "presets": lambda _: kit.save("presets", surface.presets()),
    "mistakes": lambda place: kit.save("mistakes", surface.mistakes(place)),
    "library_errors": lambda _: kit.save("library_errors", surface.library_errors()),
    "tasks": lambda _: kit.save("tasks", surface.tasks()),
    "victim": lambda _: kit.save("victim", surface.victim()),
}


def main(selected: list[str]) -> None:
    unknown = sorted(set(selected) - set(AREAS))
    if unknown:
        sys.exit(f"error: unknown area {unknown[0]!r}; choose {', '.join(AREAS)}")
    for area in selected or AREAS:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            AREAS[area](Path(place))
            os.chdir(kit.DATA)
        print(area, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
