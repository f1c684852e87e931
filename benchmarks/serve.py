"""Latency, throughput and memory of a server, against the sampler alone. JSON lines.

    python benchmarks/serve.py --system shapes --seconds 20
    python benchmarks/serve.py --system shapes --soak 1200

Starts `dalle2 serve` on the loopback address with all programs compiled. The sampler alone runs before, in this
process, on the same programs. Everything is bounded: clients send a request when they have the answer to the last.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import common
import numpy as np
from PIL import Image

import dalle2_jax as d2

PROMPT = "a large red circle"
SIZES = (1, 2, 4, 8)


def bare(system: d2.System, repeats: int) -> dict[int, float]:
    """Returns seconds per image of the sampler alone by batch size, the median of several calls."""
    seconds = {}
    for size in SIZES:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            system.text2image(PROMPT, num=size, seed=0, batch_size=size)
            times.append((time.perf_counter() - start) / size)
        seconds[size] = float(np.median(times[1:]))
    return seconds


@contextlib.contextmanager
def running(system: str) -> Iterator[tuple[str, int]]:
    """Starts a server; yields its host and port when it is ready."""
    words = [sys.executable, "-m", "dalle2_jax", "serve", "--system", system, "--port", "0", "--warmup"]
    words += ["--requests_per_minute", "1000000", "--concurrency", "100"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        host, port = process.stdout.readline().rpartition("//")[2].strip().split(":")
        try:
            while ask(host, int(port), "GET", "/readyz")[0] != 200:
                time.sleep(0.5)
            yield host, int(port)
        finally:
            process.send_signal(signal.SIGTERM)


def ask(host: str, port: int, method: str, path: str, body: dict | None = None) -> tuple[int, bytes]:
    """Returns the status and content of an answer."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    with contextlib.closing(connection):
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def generate(host: str, port: int, seed: int) -> tuple[int, np.ndarray | None]:
    """Returns the status of a generation, and its image."""
    body = {"prompt": PROMPT, "seed": seed, "response_format": "b64_json"}
    status, content = ask(host, port, "POST", "/v1/images/generations", body)
    if status != 200:
        return status, None
    image = base64.b64decode(json.loads(content)["data"][0]["b64_json"])
    return status, np.asarray(Image.open(io.BytesIO(image)))


def metric(host: str, port: int, name: str) -> float:
    """Returns a value of the server's metrics."""
    text = ask(host, port, "GET", "/metrics")[1].decode()
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def clients(count: int, work: Callable[[int], None]) -> None:
    """Calls ``work(client)`` in a thread for each client."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def idle_latency(host: str, port: int, repeats: int) -> tuple[float, float]:
    """Returns the median seconds of a request to an idle server, and those in which no batch ran."""
    latencies, overheads = [], []
    for seed in range(repeats):
        busy, start = metric(host, port, "dalle2_busy_seconds_total"), time.perf_counter()
        generate(host, port, seed)
        latencies.append(time.perf_counter() - start)
        overheads.append(latencies[-1] - (metric(host, port, "dalle2_busy_seconds_total") - busy))
    return float(np.median(latencies)), float(np.median(overheads))


def throughput(host: str, port: int, count: int, seconds: float) -> float:
    """Returns images per second of so many clients."""
    end, done = time.perf_counter() + seconds, [0] * count

    def work(client: int) -> None:
        while time.perf_counter() < end:
            generate(host, port, client)
            done[client] += 1

    start = time.perf_counter()
    clients(count, work)
    return sum(done) / (time.perf_counter() - start)


def storm(host: str, port: int, system: d2.System, requests: int, count: int) -> dict[str, int]:
    """Sends requests of 25 seeds from many clients; returns how many had each status, and wrong images."""
    expected = {seed: system.text2image(PROMPT, num=1, seed=seed).numpy[0] for seed in range(25)}
    found: dict[str, int] = {"wrong": 0}
    lock, numbers = threading.Lock(), iter(range(requests))

    def work(_: int) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            status, image = generate(host, port, number % 25)
            difference = 0 if image is None else np.abs(image.astype(int) - expected[number % 25]).max()
            with lock:
                found[str(status)] = found.get(str(status), 0) + 1
                found["wrong"] += difference > 1

    clients(count, work)
    return found


def soak(host: str, port: int, seconds: float) -> dict[str, float]:
    """Returns the megabytes of memory after a tenth and at the end of a time under load."""
    name = "process_resident_memory_bytes"
    throughput(host, port, 8, seconds / 10)
    early = metric(host, port, name)
    throughput(host, port, 8, seconds * 9 / 10)
    late = metric(host, port, name)
    return {"early_mb": early / 1e6, "late_mb": late / 1e6, "growth": late / early - 1}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="shapes")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the measurement of throughput")
    parser.add_argument("--requests", type=int, default=500, help="of 50 clients")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of load, for the growth of memory")
    options = parser.parse_args()
    system = d2.load(options.system)
    alone = bare(system, 5)
    best = min(alone.values())
    common.emit(what="sampler alone", seconds_per_image={size: round(each, 4) for size, each in alone.items()})
    with running(options.system) as (host, port):
        if options.soak:
            common.emit(what="soak", seconds=options.soak, **soak(host, port, options.soak))
            return
        latency, overhead = idle_latency(host, port, 10)
        ratio = round(latency / alone[1], 3)
        common.emit(what="idle", latency=round(latency, 4), ratio=ratio, overhead=round(overhead, 4))
        rate = throughput(host, port, 16, options.seconds)
        common.emit(what="16 clients", images_per_second=round(rate, 2), ratio=round(rate * best, 3))
        fill = metric(host, port, "dalle2_batch_rows_total") / metric(host, port, "dalle2_batch_slots_total")
        common.emit(what="batch fill", share=round(fill, 3))
        common.emit(what="50 clients", **storm(host, port, system, options.requests, 50))


if __name__ == "__main__":
    main()
