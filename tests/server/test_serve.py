"""A real server on the loopback address: OpenAI's own client, clients that leave or dawdle, the end by SIGTERM."""

import asyncio
import base64
import configparser
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from command_line import ROOT, assert_one_line, environment
from PIL import Image
from served import FEW, FEW_WITHOUT_PRIOR, TIMEOUT, png, running

from dalle2_jax.cli.serve import EXTRA, make_parser, read_config
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.server import ServerConfig
from dalle2_jax.server import serve as serving


@pytest.fixture(scope="module")
def address(serve):
    with running(serve(port=0)) as (_, address):
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0, timeout=TIMEOUT) as client:
        yield client


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def fetch(url):
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return answer.read()


def connection(address):
    """Returns a socket that is connected to a server."""
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT)


def head_of(length):
    """Returns the head of a request for images with a body of ``length`` bytes."""
    lines = ["POST /v1/images/generations HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def status(request):
    """Returns the status of the answer to a request; None without a connection."""
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # OpenAI's variations
@pytest.mark.parametrize("kind", ["url", "b64_json"])
def test_openai_client(client, tiny, kind):
    """Generate, edit and vary with OpenAI's package, unmodified."""
    extra = {"seed": 7, **FEW}
    given = {"n": 2, "response_format": kind, "size": "16x16"}
    made = client.images.generate(prompt="a red circle", **given, extra_body=extra)
    edited = client.images.edit(image=png(), mask=png(clear=True), prompt="a star", **given, extra_body=extra)
    varied = client.images.create_variation(
        image=("in.png", png()), **given, extra_body={"seed": 7, **FEW_WITHOUT_PRIOR}
    )
    for answer in (made, edited, varied):
        assert len(answer.data) == 2 and answer.created
    contents = [fetch(item.url) if kind == "url" else base64.b64decode(item.b64_json) for item in made.data]
    images, expected = [pixels(content) for content in contents], tiny.text2image("a red circle", num=2, seed=7, **FEW)
    # Rows are batches of another size, so that the last bit of a sum may differ.
    np.testing.assert_allclose(np.stack(images).astype(int), expected.numpy.astype(int), atol=1)


def test_openai_client_lists_models_and_raises_its_errors(client):
    assert [model.id for model in client.models.list()] == ["tiny", "second"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", size="1024x1024")
    assert caught.value.param == "size" and caught.value.body["message"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="a", model="dall-e-9")
    assert missing.value.code == "model_not_found"


def test_many_clients_at_once_get_their_own_images(address, tiny):
    """Requests of several clients share batches; each image is that of its seed, to one level of 255."""

    async def ask(client, seed):
        body = {"seed": seed, **FEW}
        answer = await client.images.generate(prompt=f"no {seed}", response_format="b64_json", extra_body=body)
        return pixels(base64.b64decode(answer.data[0].b64_json))

    async def ask_all():
        async with openai.AsyncOpenAI(api_key="none", base_url=f"{address}/v1", timeout=TIMEOUT) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(6)))

    found = asyncio.run(ask_all())
    for seed, image in enumerate(found):
        expected = tiny.text2image(f"no {seed}", num=1, seed=seed, **FEW).numpy[0]
        np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=1)


def test_a_client_that_leaves_cancels_its_request(serve):
    with running(serve(port=0)) as (server, address):
        body = json.dumps({"prompt": "a", "n": 10, "decoder": {"steps": 60}}).encode()
        with connection(address) as leaving:
            leaving.sendall(head_of(len(body)) + body)
            wait_until(lambda: server.service.engine.waiting >= 10)
        wait_until(lambda: server.service.engine.waiting == 0)
        assert 'status="499"' in server.service.metrics.text().decode()


def test_headers_that_never_end_are_cut_off(serve, monkeypatch):
    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.2)
    with running(serve(port=0)) as (_, address):
        with connection(address) as slow:
            slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: ")
            assert slow.recv(1000) == b""  # closed


def test_headers_of_a_later_request_that_never_end_are_cut_off(serve, monkeypatch):
    """A connection may be used again, and no byte of the next request makes the server wait without limit."""
    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.2)
    with running(serve(port=0)) as (_, address):
        with connection(address) as slow:
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /healthz HTTP/1.1\r\nHo")
            answer = b"".join(iter(lambda: slow.recv(1000), b""))  # until the server closes
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"ok\n") and answer.count(b"HTTP/1.1") == 1


def test_a_slow_request_within_the_limits_is_answered(serve, monkeypatch):
    monkeypatch.setattr("dalle2_jax.server.api.guard.BODY_SECONDS", TIMEOUT)
    body = b'{"prompt": 5}'
    with running(serve(port=0)) as (_, address):
        with connection(address) as slow:
            for byte in head_of(len(body)) + body:
                slow.sendall(bytes([byte]))
                time.sleep(0.005)
            assert slow.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_body_that_takes_too_long_in_all_is_408(serve, monkeypatch):
    """Its parts arrive in time, each."""
    monkeypatch.setattr("dalle2_jax.server.api.guard.BODY_SECONDS", 0.5)
    with running(serve(port=0)) as (_, address):
        with connection(address) as slow:
            slow.sendall(head_of(50_000))
            slow.settimeout(0.05)
            answer, end = b"", time.monotonic() + TIMEOUT
            while b"request_timeout" not in answer:
                assert time.monotonic() < end
                with contextlib.suppress(TimeoutError):
                    answer += slow.recv(10_000)
                with contextlib.suppress(ConnectionError):
                    slow.sendall(b" ")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_never_ends_is_408(serve, monkeypatch):
    monkeypatch.setattr("dalle2_jax.server.api.guard.PART_SECONDS", 0.2)
    with running(serve(port=0)) as (_, address):
        with connection(address) as slow:
            slow.sendall(head_of(50) + b"{")
            answer = b"".join(iter(lambda: slow.recv(10_000), b"")).decode()  # until the server closes
    assert " 408 " in answer.splitlines()[0] and "request_timeout" in answer


def test_the_shutdown_finishes_what_has_started(serve):
    """The request that runs is answered; a later one gets 503, or no connection."""
    with running(serve(port=0, batch_sizes=(1,))) as (server, address):
        body = json.dumps({"prompt": "a", "seed": 1, "response_format": "b64_json"}).encode()
        asked = urllib.request.Request(f"{address}/v1/images/generations", body, {"Content-Type": "application/json"})
        answers = []
        asking = threading.Thread(target=lambda: answers.append(status(asked)))
        asking.start()
        wait_until(lambda: server.service.engine.waiting or answers)
        server.stop()
        assert status(asked) in (503, None)
        asking.join(TIMEOUT)
    assert answers in ([200], [503])  # 503 if it had not started before the end


KILLED = """
import sys
from pathlib import Path
from memory_system import make_system
from dalle2_jax.server import ServerConfig, Service
from dalle2_jax.server.serve import Server
config = ServerConfig({"tiny": "nowhere"}, port=0, files=Path(sys.argv[1]), batch_sizes=(4,))
server = Server(config, Service(config, {"tiny": make_system}))
listener = server.listen()
print(listener.getsockname()[1], flush=True)
server.run_on(listener)
"""


@contextlib.contextmanager
def child(files):
    """Starts a server in a process of its own; yields the process and its address."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    words, pipes = [sys.executable, "-c", KILLED, files], {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, env=environment(PYTHONPATH=path), text=True, **pipes) as process:
        try:
            yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def asking_for(address, seed):
    """Returns a request for an image as url."""
    body = json.dumps({"prompt": "a", "seed": seed, **FEW}).encode()
    return urllib.request.Request(f"{address}/v1/images/generations", body, {"Content-Type": "application/json"})


def test_a_server_that_is_killed_under_load_serves_again(tmp_path):
    """SIGKILL: clients get errors, files are whole, and a restarted server has them and the same images."""
    with child(tmp_path) as (process, address):
        url = json.loads(fetch(asking_for(address, 0)))["data"][0]["url"]
        before = fetch(url)
        found = []
        with ThreadPoolExecutor(8) as pool:
            for seed in range(200):
                pool.submit(lambda seed: found.append(status(asking_for(address, seed))), seed)
            wait_until(lambda: 200 in found)
            process.kill()
    assert process.returncode == -signal.SIGKILL and set(found) == {200, None} and len(found) == 200
    for path in tmp_path.glob("*.png"):
        assert pixels(path.read_bytes()).shape == (16, 16, 3)
    with child(tmp_path) as (_, address):
        assert fetch(f"{address}/v1/images/files/{url.rpartition('/')[2]}") == before
        assert fetch(json.loads(fetch(asking_for(address, 0)))["data"][0]["url"]) == before


def wait_until(condition):
    for _ in range(TIMEOUT * 20):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for too long")


# --- the command ----------------------------------------------------------------------------------


def parsed(*words):
    return read_config(make_parser().parse_args(words))


def test_options_of_the_command(tmp_path):
    config = parsed("--system", "a=runs/a", "--system", "shapes", "--batch_sizes", "1,8", "--memory_gb", "2.5")
    assert config.systems == {"a": "runs/a", "shapes": "shapes"}
    assert config.batch_sizes == (1, 8) and config.memory == 2_500_000_000 and config.host == "127.0.0.1"
    assert parsed("--system", "https://example.org/demo.zip").systems == {"demo.zip": "https://example.org/demo.zip"}
    assert parsed("--system", "a").batch_sizes == ServerConfig({"a": "a"}).batch_sizes
    keys = parsed("--system", "a", "--host", "0.0.0.0", "--api_keys", str(tmp_path / "keys"))
    assert not keys.is_local


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--system", "a=x", "--system", "a=y"),
        ("--system", "a", "--host", "0.0.0.0"),
        ("--system", "a", "--port", "70000"),
        ("--system", "a", "--batch_sizes", "1,0"),
        ("--system", "a", "--queue", "0"),
        ("--system", ""),
    ],
)
def test_wrong_options(words):
    with pytest.raises(UsageError):
        parsed(*words)


@pytest.mark.parametrize("missing", EXTRA)
def test_without_its_extra_the_command_says_what_to_install(missing):
    program = f"import sys\nsys.modules[{missing!r}] = None\nfrom dalle2_jax.cli import start\nstart()"
    words = [sys.executable, "-c", program, "serve", "--system", "shapes", "--port", "0"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert_one_line(done, 1, missing, "pip install 'dalle2_jax[serve]'")


def test_the_extra_is_that_of_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    requirements = config["options.extras_require"]["serve"].split()
    assert {re.split("[<>=]", each)[0].replace("-", "_") for each in requirements} == set(EXTRA)


def test_a_port_in_use(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError):
            serving.Server((service := serve(port=taken.getsockname()[1])).config, service).listen()


def test_sigterm_ends_the_command():
    words = [sys.executable, "-m", "dalle2_jax", "serve", "--system", "shapes", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes) as process:
        address = process.stdout.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:")
        assert fetch(f"{address}/healthz") == b"ok\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0 and "Traceback" not in err
