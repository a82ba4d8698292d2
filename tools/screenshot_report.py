"""Take the screenshots of docs/report.md from a run's report. Usage: python tools/screenshot_report.py REPORT.html

Needs Chromium.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "kits"))
from chromium_kit import Browser

ROOT = Path(__file__).parent.parent
WIDTH = 1100
SECTIONS = {"Leaderboard": 358, "Warnings": 420, "Examples": 935}  # heading: height at most
PLACE = """(() => {
  const head = [...document.querySelectorAll("h2")].find(h => h.textContent.trim() == "%s");
  let next = head.nextElementSibling;
  while (next && next.tagName != "H2") next = next.nextElementSibling;
  const top = head.getBoundingClientRect().top + scrollY - 8;
  return [top, next ? next.getBoundingClientRect().top + scrollY - top : document.body.scrollHeight - top];
})()"""


def main(report: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        size = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **size)
        browser.call("Page.navigate", url=report.resolve().as_uri())
        browser.until("document.readyState == 'complete' && document.querySelectorAll('h2').length > 0", 120)
        for heading, limit in SECTIONS.items():
            top, height = browser.run(PLACE % heading)
            clip = {"x": 0, "y": top, "width": WIDTH, "height": min(height, limit), "scale": 1}
            shot = browser.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
            (out / f"report-{heading.lower()}.png").write_bytes(base64.b64decode(shot["data"]))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), ROOT / "docs" / "assets")
