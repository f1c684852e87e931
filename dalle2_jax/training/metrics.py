"""Where numbers go: a progress bar, JSON lines, and TensorBoard event files."""

import json
import logging
import os
import pathlib
import sys
from collections.abc import Mapping

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from dalle2_jax.types import UserError

logging.getLogger("tensorboardX").setLevel(logging.ERROR)


def truncate_after(path: pathlib.Path, step: int) -> None:
    """Drops the lines of steps after ``step``, which a resumed run writes again, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def progress(title: str, unit: str) -> tqdm.tqdm:
    """Returns a bar of unknown length, shown by process 0. A context manager."""
    return tqdm.tqdm(desc=title, unit=unit, dynamic_ncols=True, file=sys.stdout, disable=jax.process_index() != 0)


def from_all_hosts(told: Mapping[str, str]) -> dict[str, str]:
    """Returns what all processes tell; every one of them must call it."""
    if jax.process_count() == 1:
        return dict(told)
    letters = np.frombuffer(json.dumps(dict(told)).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(letters))).max())
    rows = multihost_utils.process_allgather(np.pad(letters, (0, longest - len(letters)), constant_values=ord(" ")))
    return {name: value for row in rows for name, value in json.loads(row.tobytes()).items()}


class MetricWriter:
    """Writes one object a logged step to ``metrics.jsonl``, the bar and TensorBoard. A context manager.

    Only process 0 writes.
    """

    def __init__(self, folder: pathlib.Path, title: str, first_step: int, total_steps: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # 0.3 s to import, and only process 0 needs it

        truncate_after(folder / "metrics.jsonl", first_step)
        self._lines = (folder / "metrics.jsonl").open("a", buffering=1)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)
        self._bar = tqdm.tqdm(
            total=total_steps, initial=first_step, desc=title, unit="step", dynamic_ncols=True, file=sys.stdout
        )

    def write(self, step: int, metrics: Mapping[str, float], rejected: Mapping[str, int] = {}) -> None:
        """Writes the metrics of ``step`` and moves the bar there.

        ``rejected``: how many records were refused so far, by cause; written as an object of that name if there are
        any, and to TensorBoard as ``rejected/CAUSE``.
        """
        if not self._active:
            return
        refused = {"rejected": dict(rejected)} if rejected else {}
        self._lines.write(json.dumps({"step": step, **metrics, **refused}) + "\n")
        for name, value in {**metrics, **{f"rejected/{cause}": count for cause, count in rejected.items()}}.items():
            self._events.add_scalar(name, value, step)
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, {metrics['examples_per_second']:.0f} examples/s", refresh=False
        )
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        if self._active:
            tqdm.tqdm.write(text, file=sys.stdout)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._bar.close()
            self._lines.close()
            self._events.close()


def mean_of_finite(history: list[tuple[int, Mapping[str, np.ndarray]]], saved: int) -> dict[str, float]:
    """Returns the mean of each metric over the steps in ``history``; of none, nothing.

    Raises:
      UserError: a metric is not finite; the message names the step, the metric and the last checkpoint, that of step
        ``saved`` or, for 0, none.
    """
    for step, metrics in history:
        for name, value in sorted(metrics.items(), key=lambda item: item[0] != "loss"):  # the loss tells most
            if not np.isfinite(value):
                good = f"step {saved}" if saved else "none"
                raise UserError(
                    f"training stopped: {name} became {float(value)} at step {step}; the last good checkpoint is "
                    f"{good}. Lower --config.optim.lr or raise optim.warmup_steps, then run the same command"
                )
    names = history[0][1] if history else ()
    return {name: float(np.mean([metrics[name] for _, metrics in history])) for name in names}
