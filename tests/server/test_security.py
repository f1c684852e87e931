"""Who may use a server, how much, and what of the machine can be reached."""

import hashlib
import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from raised import mentions
from served import FEW, TIMEOUT
from starlette.testclient import TestClient

from dalle2_jax.errors import ConfigError, DataError
from dalle2_jax.server import ServerConfig, create_app
from dalle2_jax.server.api.errors import ApiError
from dalle2_jax.server.api.files import FileStore
from dalle2_jax.server.api.keys import Limits, authenticate, read_keys
from dalle2_jax.server.engine import Closing

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
BODY = {"prompt": "a", "seed": 1, **FEW}
ROUTE = "/v1/images/generations"


@contextmanager
def client_of(service, host="http://localhost"):
    with TestClient(create_app(service), host) as client:
        yield client


@pytest.fixture
def key_file(tmp_path):
    lines = [f"{name} {hashlib.sha256(key.encode()).hexdigest()}" for name, key in KEYS.items()]
    path = tmp_path / "keys"
    path.write_text("# name and hash\n\n" + "\n".join(lines) + "\n")
    return path


def bearer(name):
    return {"Authorization": f"Bearer {KEYS[name]}"}


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "example.org"])
def test_no_server_beyond_loopback_without_keys(host, key_file):
    with pytest.raises(ConfigError, check=mentions("--api_keys", field="host")):
        ServerConfig({"a": "a"}, host=host)
    assert ServerConfig({"a": "a"}, host=host, api_keys=key_file)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_needs_no_keys(host):
    assert ServerConfig({"a": "a"}, host=host).is_local


def test_keys_are_required_everywhere_but_for_health(serve, key_file):
    with client_of(serve(api_keys=key_file), "http://anywhere.example") as client:
        paths = list(client.get("/openapi.json").json()["paths"])
        assert "/dalle2/jobs/{name}/events" in paths
        for method, path in [
            *(("POST", path) for path in paths if path.startswith("/dalle2/") and "{" not in path),
            *(("POST", f"/v1/images/{name}") for name in ("generations", "edits", "variations")),
            *(("GET", path) for path in ("/v1/models", "/v1/models/tiny", "/dalle2/jobs/x", "/metrics")),
            *(("GET", "/dalle2/jobs/x/events"), ("DELETE", "/dalle2/jobs/x")),
        ]:
            done = client.request(method, path)
            assert done.status_code == 401 and done.json()["error"]["code"] == "missing_api_key", path
            assert done.headers["www-authenticate"] == "Bearer"
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/models", headers=bearer("bob")).status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic key-of-bob", "Bearer key-of-bob x"])
def test_wrong_keys(key_file, header):
    with pytest.raises(ApiError) as caught:
        authenticate(read_keys(key_file), header)
    assert caught.value.status == 401 and "key-of" not in str(caught.value)


def test_files_of_keys(tmp_path, key_file):
    assert list(read_keys(key_file)) == ["alice", "bob"]
    secret = "key-of-carol"
    for number, text in [(1, f"carol {secret}"), (2, f"a {'0' * 64}\na {'1' * 64}"), (None, "# nothing\n")]:
        (tmp_path / "bad").write_text(text)
        with pytest.raises(
            DataError, check=mentions(*([] if number is None else [number]), path=tmp_path / "bad")
        ) as e:
            read_keys(tmp_path / "bad")
        assert secret not in str(e.value)
    with pytest.raises(DataError, check=mentions(path=tmp_path / "absent")):
        read_keys(tmp_path / "absent")


def test_jobs_of_another_key_do_not_exist(serve, key_file):
    with client_of(serve(api_keys=key_file), "http://x") as client:
        job = client.post("/dalle2/text2image", json={**BODY, "background": True}, headers=bearer("alice")).json()
        for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/events")]:
            done = client.request(method, f"/dalle2/jobs/{job['id']}{path}", headers=bearer("bob"))
            assert done.status_code == 404, path
        assert client.get(f"/dalle2/jobs/{job['id']}", headers=bearer("alice")).status_code == 200


# --- limits ---------------------------------------------------------------------------------------


def test_requests_per_minute():
    now = 0.0
    limits = Limits(60, 10, lambda: now)
    for _ in range(60):
        with limits.request("a"):
            pass
    with pytest.raises(ApiError) as caught, limits.request("a"):
        pass
    assert caught.value.status == 429 and caught.value.headers["Retry-After"] == "1"
    with limits.request("b"):
        pass
    now = 1.0
    with limits.request("a"):
        pass


def test_requests_at_a_time():
    limits = Limits(1000, 2)
    with limits.request("a"), limits.request("a"):
        with pytest.raises(ApiError) as caught, limits.request("a"):
            pass
        assert caught.value.status == 429
        with limits.request("b"):
            pass
    with limits.request("a"):
        pass


def test_a_full_queue_is_429_with_retry_after(serve, monkeypatch):
    service = serve(queue=1)
    with client_of(service) as client:
        wait_until_ready(service)
        assert client.post(ROUTE, json=BODY).status_code == 200
        monkeypatch.setattr(service.engine, "capacity", 0)
        ticket = service.engine.submit("x", *occupied(service))
        done = client.post(ROUTE, json=BODY)
        assert done.status_code == 429 and int(done.headers["retry-after"]) >= 1
        assert done.json()["error"]["code"] == "queue_full"
        ticket.cancel()


def wait_until_ready(service):
    """Waits for the request that loads the first system: it is in the queue too."""
    end = time.monotonic() + TIMEOUT
    while not service.ready:
        assert time.monotonic() < end
        time.sleep(0.01)


def occupied(service):
    """Returns an item that keeps the engine busy for a moment."""
    from dalle2_jax.server.engine.sampling import Task

    return Task("tiny", "text2image", {"prompt": "a"}, {"num": 10, **FEW}).item(), 10


def test_a_server_that_shuts_down_answers_503(serve):
    service = serve()
    with client_of(service) as client:
        assert client.post(ROUTE, json=BODY).status_code == 200
        assert client.get("/readyz").status_code == 200
        service.engine.close()
        done = client.post(ROUTE, json=BODY)
        assert done.status_code == 503 and done.json()["error"]["code"] == "shutting_down"
        assert client.get("/readyz").status_code == 503


# --- other web pages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:99", "http://localhost.evil.example"]
)
def test_pages_of_other_origins_are_rejected(client, origin):
    for method, path in [("POST", ROUTE), ("GET", "/v1/models"), ("OPTIONS", ROUTE)]:
        done = client.request(method, path, headers={"Origin": origin})
        assert done.status_code == 403 and "access-control-allow-origin" not in done.headers


def test_the_own_page_is_accepted(client):
    assert client.get("/v1/models", headers={"Origin": "http://localhost"}).status_code == 200


def test_other_host_names_are_rejected_on_loopback(client):
    """DNS rebinding: a name of the attacker that resolves to 127.0.0.1."""
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", ""):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 403
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_cors_is_for_the_named_origins_only(serve):
    with client_of(serve(cors=("https://app.example",))) as client:
        asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        allowed = client.options(ROUTE, headers=asks)
        assert allowed.status_code == 204 and allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert client.options(ROUTE, headers={**asks, "Origin": "https://other.example"}).status_code == 403


def test_headers(client):
    for path in ("/v1/models", "/docs", "/nowhere", "/openapi.json"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'self'" in headers["content-security-policy"] and "server" not in headers


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/x",
        "....//x",
        "/etc/passwd",
        "a" * 32,
        "0" * 31,
        "x.png",
    ],
)
def test_no_file_of_the_machine_is_reachable(client, path):
    for start in ("/v1/images/files/", "/", "/docs/", "/v1/models/"):
        done = client.get(start + path)
        assert done.status_code in (404, 405) and "root:" not in done.text


def test_answers_name_no_path_of_the_server(client):
    answer = client.post(ROUTE, json=BODY).text
    assert "nowhere" not in answer and "/work" not in answer and json.loads(answer)["dalle2"]["system"] == "tiny"


def test_files_expire_and_do_not_grow_without_bound(tmp_path):
    store = FileStore(tmp_path, seconds=60, max_bytes=250)
    store.open()
    names = [store.put(bytes(100)) for _ in range(4)]
    assert store.get(names[-1]) == bytes(100) and store.get(names[0]) is None
    assert len(list(tmp_path.glob("*"))) <= 3
    brief = FileStore(tmp_path, seconds=0.01)
    brief.open()
    name = brief.put(b"x")
    time.sleep(0.05)
    assert brief.get(name) is None


def test_what_a_killed_server_left_unfinished_is_removed(tmp_path):
    store = FileStore(tmp_path, seconds=60)
    store.open()
    for name, age in (("old", 61), ("young", 1)):
        path = tmp_path / f".{name}.part"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    store.put(b"x")
    assert [path.name for path in tmp_path.glob("*.part")] == [".young.part"]


def test_closing_waits_for_the_file_that_is_being_written(monkeypatch):
    store = FileStore(None, seconds=60)
    store.open()
    begun, proceed, replace = threading.Event(), threading.Event(), os.replace

    def slow_replace(unfinished, path):
        begun.set()
        assert proceed.wait(TIMEOUT)
        replace(unfinished, path)

    monkeypatch.setattr("dalle2_jax.server.api.files.os.replace", slow_replace)
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(store.put, b"x")
        assert begun.wait(TIMEOUT)
        closing = pool.submit(store.close)
        with pytest.raises(TimeoutError):
            closing.result(0.1)
        proceed.set()
        name = writing.result(TIMEOUT)
        closing.result(TIMEOUT)
    assert store.get(name) is None
    with pytest.raises(Closing):
        store.put(b"x")


@pytest.mark.parametrize("when", ["open", "os.replace"])
def test_a_full_disk_is_507_and_leaves_nothing(serve, tmp_path, monkeypatch, when):
    with client_of(serve(files=tmp_path)) as client:
        failing = opened_on_a_full_disk if when == "open" else full_disk
        monkeypatch.setattr(f"dalle2_jax.server.api.files.{when}", failing, raising=False)
        done = client.post(ROUTE, json=BODY)
        assert done.status_code == 507 and done.json()["error"]["param"] == "response_format"
        assert list(tmp_path.iterdir()) == []
        assert client.post(ROUTE, json={**BODY, "response_format": "b64_json"}).status_code == 200


def full_disk(*_):
    raise OSError(28, "No space left on device")


@contextmanager
def opened_on_a_full_disk(path, mode):
    """Opens a file that has space for a few bytes only."""
    with open(path, mode) as file:
        file.write(b"half")
        full_disk()
        yield file


def test_an_unexpected_error_is_logged_and_not_shown(serve, monkeypatch, caplog):
    service = serve()
    monkeypatch.setattr(service, "submit", lambda *_: 1 / 0)
    with client_of(service) as client, caplog.at_level(logging.ERROR, "dalle2_jax.server"):
        done = client.post(ROUTE, json=BODY)
    assert done.status_code == 500 and "division" not in done.text
    assert set(done.json()["error"]) == {"message", "type", "param", "code"}
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("logged", [False, True])
def test_prompts_are_logged_only_if_asked(serve, caplog, logged):
    with client_of(serve(log_prompts=logged)) as client, caplog.at_level(logging.INFO, "dalle2_jax.server"):
        client.post(ROUTE, json={**BODY, "prompt": "zebra"})
    assert ("zebra" in caplog.text) == logged and ROUTE in caplog.text


def test_metrics(serve):
    with client_of(serve()) as client:
        client.post(ROUTE, json={**BODY, "n": 2})
        text = client.get("/metrics").text
    assert "dalle2_images_total 2.0" in text and "dalle2_queue_images 0.0" in text
    assert f'dalle2_requests_total{{route="{ROUTE}",status="200"}} 1.0' in text
    assert "process_resident_memory_bytes" in text
