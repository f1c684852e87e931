"""The blocks of docs/serving.md, and examples/openai_client.py, against a running server."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from doc_blocks import ROOT
from served import png, running

PAGE = (ROOT / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language):
    """Returns the code blocks of a language, those of tabs too, without their indentation."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", PAGE, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{match[1]}", "", match[2], flags=re.MULTILINE) for match in found]


@pytest.fixture(scope="module")
def address(serve):
    with running(serve(port=0, batch_sizes=(2,))) as (_, address):
        yield address


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in.png").write_bytes(png(32))
    (tmp_path / "mask.png").write_bytes(png(32, clear=True))
    return tmp_path


def test_python(address, tmp_path):
    calls = [block for block in blocks("python") if ADDRESS in block]
    assert len(calls) == 1
    names = {}
    exec(calls[0].replace(ADDRESS, address), names)
    assert names["image"].startswith(b"\x89PNG") and len(names["answer"].data) == 2


def test_python_of_the_application():
    [block] = [block for block in blocks("python") if ADDRESS not in block]
    names = {}
    exec(block, names)
    assert names["app"].state.service.systems.names == ("demo",)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(address, folder):
    generations, job, keys = blocks("bash")
    done = subprocess.run(
        ["bash", "-ec", generations.replace(ADDRESS, address).replace("\ncurl", "\necho; curl")],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(answer["data"]) for answer in answers] == [2, 1, 2], done.stdout
    streamed = subprocess.run(["bash", "-ec", job.replace(ADDRESS, address)], capture_output=True, text=True)
    assert "event: progress" in streamed.stdout and "event: done" in streamed.stdout, streamed
    subprocess.run(["bash", "-ec", keys], cwd=folder, check=True)
    assert re.fullmatch(r"alice [0-9a-f]{64}\n", (folder / "keys").read_text())


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_javascript(address):
    [block] = blocks("javascript")
    program = block.replace(ADDRESS, address) + "\nconsole.log(image.subarray(1, 4).toString());"
    words = ["node", "--input-type=module", "-e", program]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == "PNG\n"


def test_example(address, tmp_path):
    words = [sys.executable, "-W", "ignore", ROOT / "examples" / "openai_client.py", "--base_url", f"{address}/v1"]
    subprocess.run([*words, "--out", tmp_path], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "edited_0.png",
        "generated_0.png",
        "varied_0.png",
        "varied_1.png",
    ]


def test_every_option_and_route_is_described(client):
    routes = {path for path in client.get("/openapi.json").json()["paths"]}
    for path in routes:
        start = path.replace("{name}", "").rstrip("/").removesuffix("/events")
        assert start.rpartition("/")[2] in PAGE, path
