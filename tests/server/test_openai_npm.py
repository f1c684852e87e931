"""OpenAI's npm package against a server, unmodified: examples/openai_client.mjs, by the newest version of the package.

npm installs it, with a Node.js that it supports, from the package registry. Without npm or the registry there is no
test.
"""

import json
import shutil
import subprocess

import numpy as np
import pytest
from command_line import ROOT
from PIL import Image
from served import png, running

PACKAGES = ("openai@latest", "node@22")
INSTALL_SECONDS = 300

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the package, the example, an image and a mask."""
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text(json.dumps({"private": True}))
    words = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=1", *PACKAGES]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode:
        pytest.skip(f"npm cannot install {' '.join(PACKAGES)}: {done.stderr[-300:]}")
    shutil.copy(ROOT / "examples" / "openai_client.mjs", folder)
    (folder / "in.png").write_bytes(png(32))
    (folder / "mask.png").write_bytes(png(32, clear=True))
    return folder


@pytest.fixture(scope="module")
def address(serve):
    with running(serve(port=0, batch_sizes=(2,))) as (_, address):
        yield address


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@needs_npm
def test_generate_edit_and_vary_in_both_formats(folder, address):
    names = ["edited_0.png", "generated_0.png", "generated_1.png", "varied_0.png", "varied_1.png"]
    for kind in ("b64_json", "url"):
        words = [folder / "node_modules" / ".bin" / "node", "openai_client.mjs", "--base_url", f"{address}/v1"]
        words += ["--image", "in.png", "--mask", "mask.png", "--response_format", kind, "--out", kind]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert sorted(file.name for file in (folder / kind).iterdir()) == names
    for name in names:
        np.testing.assert_array_equal(pixels(folder / "b64_json" / name), pixels(folder / "url" / name))
    assert (pixels(folder / "url" / "generated_0.png") != pixels(folder / "url" / "generated_1.png")).any()


@needs_npm
def test_its_errors_name_the_parameter(folder, address):
    program = f"""
import OpenAI from "openai";
const client = new OpenAI({{ baseURL: "{address}/v1", apiKey: "none" }});
try {{ await client.images.generate({{ prompt: "a", size: "1024x1024" }}); }}
catch (error) {{ console.log(error.constructor.name, error.status, error.param); }}
"""
    words = [folder / "node_modules" / ".bin" / "node", "--input-type=module", "-e", program]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.stdout.split() == ["BadRequestError", "400", "size"], done.stderr
