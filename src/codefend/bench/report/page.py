"""The HTML file: one template, everything inline, every text escaped (answers under attack are an attacker's words)."""

from __future__ import annotations

import base64
import json
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from codefend.bench.report import Report
from codefend.bench.report.attacks import seen_and_unseen, success
from codefend.bench.report.panels import panels
from codefend.bench.report.plots import score_against_eps
from codefend.bench.report.tables import (
    RULES,
    THREAT_WORDS,
    Table,
    all_metrics,
    costs,
    differences,
    doubts,
    leaderboard,
    results,
)


def html_text(report: Report) -> str:
    """The whole report as one HTML document without links to anything outside."""
    plots = [(task, inline(score_against_eps(report.entries, task))) for task in report.tasks]
    threats = dict.fromkeys(entry.group.threat for entry in report.entries)
    return render(
        "page.html",
        report=report,
        victim=report.bench.get("victim", report.config.get("victim", "")),
        counts={task: len({row["example"] for row in report.rows if row["task"] == task}) for task in report.tasks},
        leaderboards=[leaderboard(report, task) for task in report.tasks],
        rules=RULES,
        threats={threat: THREAT_WORDS[threat] for threat in threats if threat in THREAT_WORDS},
        plots=[(task, plot) for task, plot in plots if plot],
        success=success(report),
        seen=seen_and_unseen(report),
        doubts=doubts(report),
        costs=costs(report),
        differences=differences(report),
        details=[table for task in report.tasks for table in (results(report, task), all_metrics(report, task))],
        panels=panels(report),
        attacks=_attacks(report),
        config=json.dumps(report.config, indent=2, ensure_ascii=False),
    )


def render(template: str, **values: object) -> str:
    """A template of this folder with its texts escaped."""
    environment = Environment(
        loader=FunctionLoader(lambda name: files("codefend.bench.report").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def inline(svg: str) -> str:
    """An SVG as a data URL: an image runs no scripts and its ids stay its own."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii") if svg else ""


def _attacks(report: Report) -> Table:
    shown = ("summary", "goal", "threat", "steps", "source")
    known = report.bench.get("attacks", {})
    lines = [(label, *(str(found.get(key, "")) for key in shown)) for label, found in known.items()]
    columns = ("attack", "what it does", "goal", "needs", "steps", "source")
    return Table("Attacks", columns, tuple(lines), (), frozenset(columns) - {"steps"})
