"""The page in a headless browser, through its real interface: on a phone and on a desktop, light and dark."""

import base64
import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from browser import BROWSER, open_page
from PIL import Image
from served import png, running

SCREENSHOTS = os.environ.get("SCREENSHOTS_OF_TESTS")
"""A folder for the screenshots; by default they are in the tests' temporary folder."""

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: install chromium, or set BROWSER_FOR_TESTS")

DONE = "document.getElementById('message').textContent.startsWith('Done')"
IMAGES = "[...document.querySelectorAll('#tiles img')].map((image) => image.src)"


@pytest.fixture(scope="module")
def address(serve):
    with running(serve(port=0, requests_per_minute=100_000)) as (_, address):
        yield address


@pytest.fixture
def page(tmp_path, address):
    with open_page(tmp_path) as page:
        page.resize(1440, 1000)
        page.go(address)
        page.wait("document.querySelectorAll('#sizes option').length")
        yield page
        assert page.problems == []
        assert all(url.startswith((address, "data:", "blob:", "about:")) for url in page.requests), page.requests


@pytest.fixture
def shots(tmp_path):
    folder = Path(SCREENSHOTS or tmp_path / "shots")
    folder.mkdir(exist_ok=True)
    return folder


def few_steps(page):
    """Opens the settings and makes all stages quick."""
    if not page.run("document.getElementById('settings').open"):
        page.click("#settings summary")
    shown = "[...document.querySelectorAll('[data-setting=steps]')].filter((e) => e.offsetParent)"
    for stage in page.run(f"{shown}.map((e) => e.dataset.stage)"):
        page.write(f"[data-stage={stage}][data-setting=steps]", "4")


def choose(page, command):
    page.click(f"label:has([value={command}])")


def generated(page, count):
    """Generates, and returns the images."""
    page.click("#generate")
    page.wait("document.getElementById('message').textContent.startsWith('Generating')")
    page.wait(DONE)
    images = page.run(IMAGES)
    assert len(images) == count and all(image.startswith("data:image/png;base64,") for image in images)
    return images


def pixels(source):
    """Returns the image of a data URL at 16x16, the size of the system."""
    content = base64.b64decode(source.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((16, 16), Image.Resampling.BOX), float)


def give_image(page, tmp_path, selector="#file1"):
    """Chooses a file, as a user does in the dialog."""
    path = tmp_path / "given.png"
    path.write_bytes(png(32))
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
    page.wait(f"!document.querySelector('.drop:has({selector}) img').hidden")


@needs_browser
def test_prompt_progress_images_variation_and_permalink(page, shots, address):
    few_steps(page)
    page.write("#n", "2")
    page.write("#seed", "11")
    page.run(
        "window.seen = new Set(); new MutationObserver(() => document.querySelectorAll('.state').forEach((e) => "
        "seen.add(e.textContent))).observe(document.getElementById('tiles'), {subtree: true, childList: true, "
        "characterData: true})"
    )
    page.write("#prompt", "a large red circle")
    images = generated(page, 2)
    states = page.run("[...seen]")
    assert any(state.startswith("decoder ") for state in states), states
    page.screenshot(shots / "text2image.png")
    link = page.run("document.getElementById('permalink').href")
    assert page.run("document.querySelectorAll('#gallery .card').length") == 1

    page.click("#tiles figure button")  # "Vary this"
    page.wait("document.getElementById('message').textContent.startsWith('Generating')")
    page.wait(DONE)
    assert page.run("document.querySelector('input[name=command]:checked').value") == "variations"
    assert page.run(IMAGES) != images

    page.go(link)
    page.wait(DONE)
    assert page.run(IMAGES) == images and page.run("document.getElementById('prompt').value") == "a large red circle"
    assert page.run("document.querySelectorAll('#gallery .card').length") == 3


@needs_browser
def test_paint_a_mask_and_inpaint(page, shots, tmp_path):
    choose(page, "inpaint")
    give_image(page, tmp_path)
    few_steps(page)
    page.write("#n", "1")
    page.click("#generate")
    page.wait("document.getElementById('message').classList.contains('wrong')")  # nothing is painted
    left, top, width, height = page.place("#mask")
    page.drag([(left + width * x, top + height * 0.3) for x in (0.2, 0.4, 0.6, 0.8)])
    page.screenshot(shots / "inpaint_mask.png")
    [image] = generated(page, 1)
    before = pixels(page.run("document.querySelector('#first img').src"))
    after = pixels(image)
    kept, changed = (np.abs(after[rows] - before[rows]).mean() for rows in (slice(10, 16), slice(4, 5)))
    assert kept < 20 < changed, (kept, changed)


@needs_browser
@pytest.mark.parametrize("command", ["interpolate", "text_diff"])
def test_the_slider_shows_the_frames(page, shots, tmp_path, command):
    choose(page, command)
    give_image(page, tmp_path)
    if command == "interpolate":
        give_image(page, tmp_path, "#file2")
    else:
        page.write("#before", "one two three")
        page.write("#after", "four")
    few_steps(page)
    page.write("#frames", "3")
    generated(page, 3)
    shown = "[...document.querySelectorAll('#tiles figure')].map((figure) => !figure.hidden)"
    assert page.run(shown) == [True, False, False]
    page.place("#frame")
    page.run("document.getElementById('frame').focus()")
    page.press("ArrowRight", 39)
    assert page.run(shown) == [False, True, False]
    page.screenshot(shots / f"{command}.png")


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1440, False), (1440, True)])
def test_it_fits_phones_and_desktops(page, shots, tmp_path, width, dark):
    page.resize(width, 900, dark)
    few_steps(page)
    page.write("#prompt", "a" * 300)
    page.write("#n", "3")
    generated(page, 3)
    for command in ("text2image", "variations", "inpaint", "interpolate", "text_diff"):
        choose(page, command)
        too_wide, elements = page.overflow()
        assert too_wide <= 0 and elements == [], (command, elements)
        inside = "document.getElementById('form').getBoundingClientRect().right <= innerWidth - 15"
        assert page.run(inside), f"{command} reaches over the margin"
    choose(page, "text2image")
    page.run("scrollTo(0, 0)")
    page.screenshot(path := shots / f"page_{width}_{'dark' if dark else 'light'}.png")
    with Image.open(path) as image:
        ground = np.asarray(image.convert("RGB"))[3, 3]
    assert ground.max() < 60 if dark else ground.min() > 240


@needs_browser
def test_the_keyboard_suffices(page):
    """Tab reaches the prompt, Enter generates; arrows choose a command; keys paint the mask."""
    few_steps(page)
    page.write("#n", "1")
    page.run("document.querySelector('[value=text2image]').focus()")
    page.press("Tab", 9)
    assert page.run("document.activeElement.id") == "prompt"
    page.call("Input.insertText", text="a star")
    page.press("Enter", 13, "\r")
    page.wait(DONE)
    page.run("document.querySelector('[value=text2image]').focus()")
    page.press("ArrowRight", 39)
    assert page.run("document.querySelector('input[name=command]:checked').value") == "variations"
    page.click("#tiles figure button:nth-of-type(2)")  # "Use as input"
    page.wait("document.querySelector('input[name=command]:checked').value === 'inpaint'")
    page.wait("!document.querySelector('#first img').hidden")
    page.run("document.getElementById('mask').focus()")
    before = page.run("document.getElementById('mask').toDataURL()")
    page.press("ArrowRight", 39)
    page.press(" ", 32, " ")
    assert page.run("document.getElementById('mask').toDataURL()") != before


def test_the_page_names_no_other_host():
    folder = Path(__file__).parents[2] / "dalle2_jax" / "server" / "page"
    files = [path for path in folder.iterdir() if path.suffix in (".html", ".js", ".css")]
    assert len(files) >= 6
    for path in files:
        assert "//" not in "\n".join(
            line for line in path.read_text().splitlines() if not line.strip().startswith("//")
        ), path


def test_every_file_is_served(serve):
    from starlette.testclient import TestClient

    from dalle2_jax.server import create_app
    from dalle2_jax.server.api.health import PAGES

    folder = Path(__file__).parents[2] / "dalle2_jax" / "server" / "page"
    with contextlib.closing(TestClient(create_app(serve()), "http://localhost")) as client:
        for path, (name, kind) in PAGES.items():
            answer = client.get(path)
            assert answer.content == (folder / name).read_bytes() and answer.headers["content-type"].startswith(kind)
    assert {name for name, _ in PAGES.values()} == {p.name for p in folder.iterdir() if p.suffix != ".py"} - {
        "__pycache__"
    }
