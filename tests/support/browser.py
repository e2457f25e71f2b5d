"""A page in a headless Chromium: what it draws, at a width, and its errors.

Windows of Chromium are at least 500 pixels wide, so that the page is in a frame
of the width that is asked for.
"""

import json
import re
import shutil
import subprocess
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Of a chart: what draws one point, bar, cell or line.
_MARKS = "path.point, g.point path, path.js-line, .heatmaplayer image, path.box"
_FRAME = """<!DOCTYPE html><html><body style="margin:0">
<iframe src="{page}"
  style="border:0;width:{width}px;height:{height}px"></iframe>
<script>
addEventListener("load", () => setTimeout(() => {{
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement;
  const charts = Object.fromEntries([...page.querySelectorAll(".chart")].map(
    (chart) => [chart.id, {{
      width: chart.getBoundingClientRect().width,
      marks: [...chart.querySelectorAll({marks})].filter(
        (mark) => mark.getAttribute("d") !== "M0,0Z").length,
    }}]));
  const seen = document.createElement("pre");
  seen.id = "seen";
  seen.textContent = JSON.stringify({{
    width: root.scrollWidth, height: root.scrollHeight, charts,
    background: getComputedStyle(page.body).backgroundColor,
  }});
  document.body.append(seen);
}}, 4000));
</script></body></html>"""


class Seen(NamedTuple):
  """What a browser showed.

  Attributes:
    errors: lines on the console, and of files that were not loaded.
    width, height: of the page with all that overflows, pixels.
    charts: {id: {"width": pixels, "marks": number of points, lines, cells}}.
    background: color of the page.
  """

  errors: list[str]
  width: int
  height: int
  charts: dict[str, dict[str, float]]
  background: str


def find():
  """The path of a Chromium, or None."""
  return next(filter(None, map(shutil.which, NAMES)), None)


def look(page, folder, *, width, height=900, dark=False, screenshot=None):
  """Opens a page, and saves a picture of it if a path is given."""
  frame = folder / "frame.html"
  frame.write_text(
    _FRAME.format(
      page=page.resolve().as_uri(),
      width=width,
      height=height,
      marks=json.dumps(_MARKS),
    )
  )
  command = [
    find(),
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",
    f"--user-data-dir={folder / 'profile'}",
    f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    f"--window-size={max(width, 500)},{height}",
    f"--screenshot={screenshot}" if screenshot else "--dump-dom",
    str(frame),
  ]
  ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
  errors = re.findall(r"(?:CONSOLE|ERR_).*", ended.stderr)
  if screenshot:
    return errors
  found = re.search(r'<pre id="seen">(.*?)</pre>', ended.stdout)
  assert found, ended.stderr
  return Seen(errors, **json.loads(found[1]))
