"""deploy/ray_serve.py with two replicas on this machine, and OpenAI's client.

Runs where RAY_FOR_TESTS is a Python that has the packages ``ray[serve]`` and ``dalle2_jax[serve]``.
"""

import base64
import io
import os
import socket
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from command_line import ROOT, environment
from PIL import Image
from served import png

PYTHON = os.environ.get("RAY_FOR_TESTS")

pytestmark = pytest.mark.skipif(PYTHON is None, reason="no Ray: set RAY_FOR_TESTS")

TIMEOUT = 3600
"""Seconds; each replica compiles the programs of the system `shapes`."""

SETTINGS = {"decoder": {"steps": 4, "guidance": 3.0}, "upsampler_1": {"steps": 2}}
WITH_PRIOR = {**SETTINGS, "prior": {"steps": 4}}

PROGRAM = """
import sys
import ray
from ray import serve
ray.init(num_cpus=2, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from deploy.ray_serve import app
serve.run(app)
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"DALLE2_SYSTEMS": "shapes", "DALLE2_REPLICAS": "2", "DALLE2_FILES": str(folder / "files")}
    waits = {"RAY_raylet_start_wait_time_s": "600", "RAY_worker_register_timeout_seconds": "600"}
    waits["RAY_agent_register_timeout_ms"] = "600000"  # 30 s by default: too few on a busy machine
    given = environment(PYTHONPATH=str(ROOT), RAY_USAGE_STATS_ENABLED="0", **settings, **waits)
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(
            [PYTHON, "-c", PROGRAM, str(port)],
            cwd=ROOT,
            env=given,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        ) as process,
    ):
        lines = iter(process.stdout.readline, "")
        assert any(line == "ready\n" for line in lines), (folder / "log").read_text()[-5_000:]
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()  # ends the program
        process.stdout.read()


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def content_of(item):
    if item.b64_json:
        return base64.b64decode(item.b64_json)
    with urllib.request.urlopen(item.url, timeout=TIMEOUT) as answer:
        return answer.read()


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # OpenAI's variations
def test_replicas_give_the_same_images_to_openais_client(address):
    """Generate, edit and vary, as `url` and in base64: whichever replica answers, the images are those of the seed."""
    found = []
    with openai.OpenAI(api_key="none", base_url=f"{address}/v1", timeout=TIMEOUT) as client:
        assert [model.id for model in client.models.list()] == ["shapes"]
        for kind in ("url", "b64_json"):
            given, extra = {"n": 2, "response_format": kind}, {"seed": 7, **WITH_PRIOR}
            made = client.images.generate(prompt="a large red circle", **given, extra_body=extra)
            edited = client.images.edit(
                image=png(64), mask=png(64, clear=True), prompt="a star", **given, extra_body=extra
            )
            varied = client.images.create_variation(
                image=("in.png", png(64)), **given, extra_body={"seed": 7, **SETTINGS}
            )
            found.append([pixels(content_of(item)) for answer in (made, edited, varied) for item in answer.data])
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="a", size="1024x1024")
        assert caught.value.param == "size"

        def first(_):
            body = {"seed": 7, **WITH_PRIOR}
            answer = client.images.generate(
                prompt="a large red circle", n=2, response_format="b64_json", extra_body=body
            )
            return pixels(content_of(answer.data[0]))

        with ThreadPoolExecutor(6) as pool:
            repeated = list(pool.map(first, range(12)))
    assert len(found[0]) == 6
    np.testing.assert_allclose(found[0], found[1], atol=1)
    np.testing.assert_allclose(repeated, [found[0][0]] * 12, atol=1)
