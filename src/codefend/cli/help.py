"""The front page of ``codefend --help``: verbs in groups, with an example each."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

GROUPS = {
    "Use": ("purify", "ask", "caption", "serve", "mcp-proxy", "export"),
    "Measure": ("attack", "eval", "certify", "challenge", "report", "leaderboard", "demo"),
    "Train": ("pairs", "train", "build-victim", "calibrate", "card", "optimize-prompt", "prompts"),
    "Inspect": ("list", "doctor"),
}
EXAMPLES = {
    "Use": "codefend purify photos/ -o clean/",
    "Measure": "codefend eval quick --run runs/quick && codefend report runs/quick",
    "Train": "codefend train bridge --run runs/bridge --set pairs=runs/pairs",
    "Inspect": "codefend list purifiers",
}


class GroupedVerbs(TyperGroup):
    """A command group whose help lists its verbs by `GROUPS`; verbs in no group come last."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = set(self.list_commands(ctx))
        rest = names - {verb for verbs in GROUPS.values() for verb in verbs}
        for title, verbs in (*GROUPS.items(), ("Other", tuple(sorted(rest)))):
            rows = [(verb, self._summary(ctx, verb)) for verb in verbs if verb in names]
            if not rows:
                continue
            with formatter.section(title):
                formatter.write_dl(rows)
                if title in EXAMPLES:
                    formatter.write_paragraph()
                    formatter.write_text(f"e.g. {EXAMPLES[title]}")

    def _summary(self, ctx: Any, verb: str) -> str:
        command = self.get_command(ctx, verb)
        return "" if command is None else command.get_short_help_str(limit=90)
