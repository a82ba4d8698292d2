"""The HTML file: one template, everything inline, every text escaped (answers under attack are an attacker's words)."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from codefend.bench.report import tables
from codefend.bench.report.panels import panels
from codefend.bench.report.plots import score_against_eps
from codefend.bench.report.reading import Report


def html_text(report: Report) -> str:
    """The whole report as one HTML document without links to anything outside."""
    plots = [(task, inline(score_against_eps(report.entries, task))) for task in report.tasks]
    threats = dict.fromkeys(entry.group.threat for entry in report.entries)
    details = [table for t in report.tasks for table in (tables.results(report, t), tables.all_metrics(report, t))]
    return render(
        "page.html",
        report=report,
        counts={task: len({row["example"] for row in report.rows if row["task"] == task}) for task in report.tasks},
        overview=tables.overview(report) if len(report.tasks) > 1 else None,
        leaderboards=[(tables.leaderboard(report, task), _description(report, task)) for task in report.tasks],
        rules=tables.RULES,
        threats={threat: tables.THREAT_WORDS[threat] for threat in threats if threat in tables.THREAT_WORDS},
        plots=[(task, plot) for task, plot in plots if plot],
        rates=[tables.success(report), tables.seen_and_unseen(report)],
        warnings=tables.warnings(report),
        costs=tables.costs(report),
        details=[*details, tables.differences(report), tables.attack_table(report)],
        panels=panels(report),
        config=json.dumps(report.config, indent=2, ensure_ascii=False),
    )


def _description(report: Report, task: str) -> str:
    return str(report.bench.get("tasks", {}).get(task, {}).get("description", ""))


def render(template: str, **values: object) -> str:
    """A template of this folder with its texts escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def inline(svg: str) -> str:
    """An SVG as a data URL: an image runs no scripts and its ids stay its own."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii") if svg else ""
