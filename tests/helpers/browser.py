"""A page in a real browser, if there is one."""

import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needed = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
)


def measured(page: str, width: int, text: str, directory: Path) -> str:
    """What a JavaScript expression gives in a window of that many pixels, in which `root` is the page's root element.

    The window is a frame, which can be of any width, and so the script that measures is outside the page's policy.

    Anything that the page says to the console fails.
    """
    assert CHROMIUM is not None
    probe = directory / "probe.html"
    probe.write_text(
        f"""<iframe id="page" width="{width}" height="800" style="border:0" srcdoc="{escape(page)}"></iframe>
<output></output><script>onload = () => {{
  const root = document.getElementById("page").contentDocument.documentElement;
  document.querySelector("output").textContent = {text};
}}</script>"""
    )
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={directory / 'profile'}", probe.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    return shown.stdout.partition("<output>")[2].partition("</output>")[0]
