"""Takes the screenshots of docs/serving.md: a server of the system ``shapes`` in a headless Chromium.

    python docs/screenshots.py

The browser is Chromium or Chrome on the PATH, or BROWSER_FOR_TESTS. The page is used as the tests of it do.
"""

import contextlib
import io
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import browser  # noqa: E402
from browser import Page, open_page  # noqa: E402

PAGES = ROOT / "docs"
DONE = "document.getElementById('message').textContent.startsWith('Done')"
SECONDS = 3600
"""Until what is waited for is there; programs are compiled meanwhile."""

COLOURS = 256
"""Of a screenshot, so that its file is small."""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Starts a server; yields its address."""
    words = [sys.executable, "-m", "dalle2_jax", "serve", "--system", "shapes", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def shoot(page: Page, name: str) -> None:
    """Writes a screenshot of what the window shows."""
    page.run("scrollTo(0, 0)")
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(path := pathlib.Path(folder, "shot.png"))
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    window = image.crop((0, 0, *page.run("[innerWidth, innerHeight]")))
    window.quantize(COLOURS).save(PAGES / name, optimize=True)


def open_form(page: Page, address: str) -> None:
    """Opens the page, and waits until it knows the system."""
    page.go(address)
    page.wait("document.querySelectorAll('#sizes option').length")


def generate(page: Page, prompt: str, seed: int) -> None:
    """Fills in the form and sends it."""
    if not page.run("document.getElementById('settings').open"):
        page.click("#settings summary")
    page.write("#seed", str(seed))
    page.click("#settings summary")
    page.write("#prompt", prompt)
    page.click("#generate")


def main() -> None:
    """Takes all screenshots."""
    browser.TIMEOUT = SECONDS
    with tempfile.TemporaryDirectory() as folder, server() as address, open_page(pathlib.Path(folder)) as page:
        page.resize(1440, 640)
        open_form(page, address)
        generate(page, "a large red circle", 5)
        shown = "[...document.querySelectorAll('.state')]"
        page.wait(f"{shown}.filter((e) => /decoder (1[0-9]|2[0-9])/.test(e.textContent)).length >= 4 || {DONE}")
        shoot(page, "serving_page.png")
        page.wait(DONE)

        page.resize(1440, 740, dark=True)
        open_form(page, address)
        generate(page, "a small blue star", 7)
        page.wait(DONE)
        page.click("#tiles figure button")  # "Vary this"
        page.wait("document.getElementById('message').textContent.startsWith('Generating')")
        page.wait(DONE)
        shoot(page, "serving_variations.png")

        page.resize(390, 844)
        page.click("#tiles figure button:nth-of-type(2)")  # "Use as input"
        page.wait("document.querySelector('input[name=command]:checked').value === 'inpaint'")
        page.wait("!document.querySelector('#first img').hidden")
        left, top, width, height = page.place("#mask")
        for y in (0.2, 0.3, 0.4):
            page.drag([(left + width * x, top + height * y) for x in (0.2, 0.4, 0.6, 0.8)])
        page.write("#prompt", "a large green square")
        shoot(page, "serving_inpaint.png")


if __name__ == "__main__":
    main()
