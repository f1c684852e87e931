"""A report in a headless browser: on a phone and on a desktop, in both colour schemes, never too wide."""

import subprocess

import numpy as np
import pytest
from browser import BROWSER
from PIL import Image
from run_folders import write_system

from dalle2_jax.report import write_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium, or set BROWSER_FOR_TESTS")


def screenshot(page, path, width, height, *options):
    """Draws a page of a given size."""
    profile = f"--user-data-dir={path.parent / 'profile'}"
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", profile)
    size = (f"--window-size={width},{height}", f"--screenshot={path}")
    command = [BROWSER, *fixed, *options, *size, page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("width", [390, 1440])
def test_a_report_fits_a_phone_and_a_desktop(tmp_path, width):
    write_report([write_system(tmp_path / "demo")], tmp_path / "report.html")
    light = screenshot(tmp_path / "report.html", tmp_path / "light.png", width, 1200)
    assert light.shape == (1200, width, 3)
    background = light[2, 2].astype(int)
    assert background.min() > 240
    inked = (np.abs(light.astype(int) - background).max(axis=2) > 30).mean()
    assert 0.01 < inked < 0.6
    # Nothing reaches over the right edge: the margin there is empty.
    assert np.abs(light[:, -6:].astype(int) - background).max() == 0
    blue = (light[..., 2].astype(int) - light[..., 0] > 80).sum()
    assert blue > 100  # curves and intervals in the first colour


def test_a_dark_browser_shows_a_dark_page(tmp_path):
    write_report([write_system(tmp_path / "demo")], tmp_path / "report.html")
    dark = screenshot(tmp_path / "report.html", tmp_path / "dark.png", 390, 600, "--force-dark-mode")
    assert dark[2, 2].max() < 60 and dark.max() > 200
