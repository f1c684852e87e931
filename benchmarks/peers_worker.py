"""One side of `peers.py`: answers requests to run a call once, as JSON lines. Needs Python's own library only."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

DECODER = {"image_size": 64, "channels": 128, "mult": (1, 2, 3, 4), "context_dim": 512, "batch": 4}
PRIOR = {"width": 512, "layers": 8, "heads": 8, "embed_dim": 768, "tokens": 77, "batch": 16}
STEPS = 25
"""Of the prior and of the decoder, in sampling."""

TINY_DECODER = {"image_size": 16, "channels": 32, "mult": (1, 2, 2, 2), "context_dim": 32, "batch": 2}
TINY_PRIOR = {"width": 64, "layers": 1, "heads": 1, "embed_dim": 48, "tokens": 7, "batch": 2}
TINY_STEPS = 2


def sizes(tiny: bool) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Returns the sizes of decoder and prior, and the steps of sampling."""
    return (TINY_DECODER, TINY_PRIOR, TINY_STEPS) if tiny else (DECODER, PRIOR, STEPS)


def chosen(calls: Mapping[str, Callable[[], Any]], operations: bool) -> dict[str, Callable[[], Any]]:
    """Returns the calls of `peers_operations.py`, or those of `peers.py`."""
    return {name: calls[name] for name in (("step", "operations") if operations else ("forward", "step"))}


def serve(facts: Mapping[str, Any], calls: Mapping[str, Callable[[], Any]]) -> None:
    """Prints the facts, then runs a call for each line of standard input that names one, and prints its seconds and
    the dictionary that it returns, as JSON.

    Every call runs once before, to compile. At the end of the input the peak of the resident memory is printed.

    Args:
      facts: parameters and versions.
      calls: name -> a function that returns when its result is there.
    """
    first = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
    _answer({**facts, "first_seconds": first})
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        result = calls[line.strip()]()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        found = result if isinstance(result, dict) else None  # not the arrays of a forward pass
        _answer({"seconds": seconds, "cpu_seconds": cpu_seconds, "result": found})
    _answer({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def _answer(content: Mapping[str, Any]) -> None:
    print(json.dumps(content), flush=True)
