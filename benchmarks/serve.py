"""Latency, throughput and memory of a server, against the sampler alone. JSON lines, then a Markdown table.

    python benchmarks/serve.py --system shapes
    python benchmarks/serve.py --system shapes --soak 1200

Starts `dalle2 serve` on the loopback address with all programs compiled; the sampler alone runs in this process, on the
same programs, while the server is idle. Everything is bounded: clients send a request when they have the answer to the
last, and stop when their time is over. About five minutes on two cores, of which one is compilation.
"""

import argparse
import base64
import contextlib
import functools
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
from dalle2_jax.errors import UserError

PROMPT = "a large red circle"
SIZES = (1, 2, 4, 8, 16)
"""Batch sizes of the sampler alone; those of the server are its defaults."""

RAMP_SECONDS = 1.5
"""From the start of clients until they are counted."""

READY_SECONDS, ASK_SECONDS, STORM_SECONDS, END_SECONDS = 900.0, 300.0, 300.0, 90.0
"""Until the server is ready, for an answer, for all requests of the 50 clients, and for the server to end."""

SEEDS = 25
"""Of the 50 clients' requests, so that each image is computed once to compare with."""


class Server:
    """A running server.

    Args:
      host: its address.
      port: its port.
    """

    def __init__(self, host: str, port: int):
        self._host, self._port = host, port

    def ask(self, method: str, path: str, body: dict | None = None) -> tuple[int, bytes]:
        """Returns the status and content of an answer."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=ASK_SECONDS)
        with contextlib.closing(connection):
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def generate(self, seed: int) -> tuple[int, bytes | None]:
        """Returns the status of a generation, and its image as a PNG file."""
        body = {"prompt": PROMPT, "seed": seed, "response_format": "b64_json"}
        status, content = self.ask("POST", "/v1/images/generations", body)
        return status, base64.b64decode(json.loads(content)["data"][0]["b64_json"]) if status == 200 else None

    def metric(self, name: str) -> float:
        """Returns a value of the server's metrics."""
        text = self.ask("GET", "/metrics")[1].decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


@contextlib.contextmanager
def running(system: str) -> Iterator[Server]:
    """Starts a server; yields it when it is ready. UserError if it does not become ready."""
    words = [sys.executable, "-m", "dalle2_jax", "serve", "--system", system, "--port", "0", "--warmup"]
    words += ["--requests_per_minute", "1000000", "--concurrency", "100"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            address = process.stdout.readline().rpartition("//")[2].strip()
            if not address:
                raise UserError(f"{' '.join(words[1:])} does not start")
            host, port = address.split(":")
            server, end = Server(host, int(port)), time.perf_counter() + READY_SECONDS
            while server.ask("GET", "/readyz")[0] != 200:
                if time.perf_counter() > end:
                    raise UserError(f"the server is not ready after {READY_SECONDS:g} s")
                time.sleep(0.5)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def clients(count: int, work: Callable[[int], None]) -> None:
    """Calls ``work(client)`` in a thread for each client."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def timed(function: Callable[[], object]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sampler_alone(system: d2.System) -> dict[int, float]:
    """Returns seconds per image of the sampler by batch size."""
    sample = functools.partial(system.text2image, PROMPT, seed=0)
    return {size: timed(functools.partial(sample, num=size, batch_size=size)) / size for size in SIZES}


def idle(server: Server, system: d2.System, repeats: int) -> dict[str, float]:
    """Returns the median seconds of a request to an idle server, and those without a batch; the ratio to the sampler.

    Requests and calls of the sampler take turns, so that both meet the same machine.
    """
    alone, latency, overhead = [], [], []
    for seed in range(repeats):
        alone.append(timed(lambda seed=seed: system.text2image(PROMPT, num=1, seed=seed)))
        busy = server.metric("dalle2_busy_seconds_total")
        latency.append(timed(lambda seed=seed: server.generate(seed)))
        overhead.append(latency[-1] - (server.metric("dalle2_busy_seconds_total") - busy))
    medians = [float(np.median(times)) for times in (latency, overhead, alone)]
    return {"latency": medians[0], "overhead": medians[1], "ratio": medians[0] / medians[2]}


def crowd(server: Server, system: d2.System, count: int, seconds: float, repeats: int) -> tuple[dict, dict]:
    """Returns seconds per image of the sampler by batch size, and the rate and batches of so many clients.

    They take turns, ``repeats`` times, as in `idle`. Images are finished a batch at a time, so that the rate of a turn
    is exact to a batch: the mean of all turns is returned.
    """
    sampler_alone(system)  # compiles
    names = ("dalle2_batch_rows_total", "dalle2_batch_slots_total")
    before, alone, rates = [server.metric(name) for name in names], [], []
    for _ in range(repeats):
        alone.append(sampler_alone(system))
        rates.append(throughput(server, count, seconds / repeats))
    rows, slots = (server.metric(name) - value for name, value in zip(names, before, strict=True))
    medians = {size: float(np.median([times[size] for times in alone])) for size in SIZES}
    rate = float(np.mean(rates))
    return medians, {"images_per_second": rate, "ratio": rate * min(medians.values()), "fill": rows / slots}


def throughput(server: Server, count: int, seconds: float) -> float:
    """Returns images per second of so many clients, after `RAMP_SECONDS`."""
    start, done = time.perf_counter() + RAMP_SECONDS, list[float]()

    def work(client: int) -> None:
        while time.perf_counter() < start + seconds:
            status, _ = server.generate(client)
            if status == 200:
                done.append(time.perf_counter())

    clients(count, work)
    return sum(start <= moment < start + seconds for moment in done) / seconds


def storm(server: Server, system: d2.System, requests: int, count: int) -> dict[str, float]:
    """Sends requests of `SEEDS` seeds from many clients; returns how many had each status, and the wrong images."""
    expected = [system.text2image(PROMPT, num=1, seed=seed).numpy[0].astype(int) for seed in range(SEEDS)]
    found: dict[str, float] = {"wrong": 0}
    lock, numbers, start = threading.Lock(), iter(range(requests)), time.perf_counter()

    def work(_: int) -> None:
        while time.perf_counter() < start + STORM_SECONDS:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            status, content = server.generate(number % SEEDS)
            wrong = content is not None and np.abs(_pixels(content) - expected[number % SEEDS]).max() > 1
            with lock:
                found[str(status)] = found.get(str(status), 0) + 1
                found["wrong"] += int(wrong)

    clients(count, work)
    return {**found, "seconds": time.perf_counter() - start}


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def soak(server: Server, seconds: float) -> dict[str, float]:
    """Returns the megabytes of memory after a tenth and at the end of a time under load."""
    name = "process_resident_memory_bytes"
    throughput(server, 8, seconds / 10)
    early = server.metric(name)
    rate = throughput(server, 8, seconds * 9 / 10)
    late = server.metric(name)
    return {"early_mb": early / 1e6, "late_mb": late / 1e6, "growth": late / early - 1, "images_per_second": rate}


def table(results: dict[str, dict]) -> str:
    """Returns the figures as a Markdown table; ``results`` are those that `common.emit` prints, by name."""
    rows = []
    if "sampler alone" in results:
        best = min(results["sampler alone"].items(), key=lambda pair: pair[1])
        rows.append((f"`dalle2 sample` at its best batch size, {best[0]}", f"{1 / best[1]:.2f} images/s", ""))
    if "16 clients" in results:
        many = results["16 clients"]
        rows.append(("16 clients", f"{many['images_per_second']:.2f} images/s, {many['ratio']:.3f} of it", ">= 0.9"))
        rows.append(("rows of batches that are no padding", f"{many['fill']:.1%}", ""))
    if "idle" in results:
        one = results["idle"]
        seconds = f"{one['latency']:.3f} s, {one['ratio']:.3f} of the sampler"
        rows.append(("one request, idle server", seconds, "<= 1.15"))
        rows.append(("of it without sampling", f"{1000 * one['overhead']:.1f} ms", "< 10 ms"))
    if "50 clients" in results:
        counts = {name: f"{value:g}" for name, value in results["50 clients"].items() if name != "seconds"}
        rows.append(("50 clients: requests by status", ", ".join(map(": ".join, counts.items())), "wrong: 0"))
    if "soak" in results:
        long = results["soak"]
        grown = f"{long['early_mb']:.0f} to {long['late_mb']:.0f} MB, {long['growth']:+.1%}"
        rows.append((f"memory in {long['seconds']:g} s of 8 clients", grown, "<= 5 %"))
    return "\n".join(f"| {' | '.join(row)} |" for row in (("figure", "value", "target"), ("---",) * 3, *rows))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="shapes")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the measurement of throughput")
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns of the sampler and the clients; eight times as many requests"
    )
    parser.add_argument("--requests", type=int, default=500, help="of 50 clients")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of load, for the growth of memory; only that")
    options = parser.parse_args()
    results: dict[str, dict] = {}

    def record(name: str, found: dict) -> None:
        results[name] = found
        common.emit(what=name, **{str(key): round(value, 4) for key, value in found.items()})

    with running(options.system) as server:
        if options.soak:
            record("soak", {"seconds": options.soak, **soak(server, options.soak)})
        else:
            system = d2.load(options.system)
            alone, many = crowd(server, system, 16, options.seconds, options.repeats)
            record("sampler alone", alone)
            record("16 clients", many)
            record("idle", idle(server, system, 8 * options.repeats))
            record("50 clients", storm(server, system, options.requests, 50))
    print(table(results))


if __name__ == "__main__":
    main()
