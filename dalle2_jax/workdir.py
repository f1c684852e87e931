"""How a system lies on disk. Orbax is called here alone.

    WORKDIR/                     a system
      clip/                      one folder a stage
        config.json              the stage's whole config
        contract.json            the embedding contract it was trained under
        base.json                of a fine-tuned stage: a fingerprint of the weights that it started from
        moments.json             the noise it predicts, where it was measured, and of which checkpoint
        tokenizer/               what turns captions into its tokens
        checkpoints/<step>/      params, ema, opt_state, stats; the data position as metadata
        metrics.jsonl  tensorboard/  samples/

Whatever trains or converts writes this; whatever samples or evaluates reads it. Every file
appears under its final name only when it is complete. A stage may be a link to another system's.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dalle2_jax.files import write_atomically
from dalle2_jax.types import UserError

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs each array, and the traceback of what it raises


def _closed_loops_unsaid(said: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns a ``sys.unraisablehook`` that leaves out what follows from an array that could not be written.

    Orbax raises the first failure and closes its event loop; tensorstore then prints a traceback for
    each array that ends later, from threads of its own, at any time.
    """

    def say(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            said(unraisable)

    return say


sys.unraisablehook = _closed_loops_unsaid(sys.unraisablehook)

LEAST_SLICE = 2**20
"""Bytes: of an array that many devices hold alike each writes a part, unless parts are smaller than this. Cutting one
is a dispatch, for which the run waits: two to five times as long on eight devices (benchmarks/checkpoint.py)."""

GRACE = 0.5
"""Seconds given to the threads that still read a checkpoint found to be damaged."""

MAY_CHANGE = ("total_steps", "log_every", "checkpoint_every", "sample_every", "keep_checkpoints", "mesh", "workers")
"""Config fields in which a resumed run may differ from the run that made the folder."""

MAY_CHANGE_IN_DATA = "max_rejected"
"""Of any data set, likewise: a run that ended for too many bad records goes on with more patience."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: its step, the trees asked for, the data position, and what was skipped."""

    step: int
    trees: dict[str, Any]
    data_state: dict[str, Any]
    skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage's folder in a system's workdir."""

    root: pathlib.Path
    stage: str

    @property
    def path(self) -> pathlib.Path:
        return self.root / self.stage

    def exists(self) -> bool:
        """Whether this stage was ever started here."""
        return (self.path / "config.json").is_file()

    def is_link_to(self, other: "StageFolder") -> bool:
        """Whether this is another system's stage, linked."""
        return self.path.is_symlink() and self.path.resolve() == other.path.resolve()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns the object in ``name`` or None if there is no such file. UserError if it is not JSON."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); restore it or remove {self.path}") from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes ``value`` to ``name`` in this folder, atomically."""
        write_atomically(self.path / name, json.dumps(value, indent=2, sort_keys=True) + "\n")

    def claim(self, config: Mapping[str, Any]) -> None:
        """Writes the config, or checks that the folder's checkpoints were made by the same one.

        Raises:
          UserError: the folder belongs to another config; the message shows the difference.
        """
        stored = self.read_json("config.json")
        if stored is not None and self.latest_step() is not None:
            lines = difference(stored, config)
            if lines:
                raise UserError(
                    f"{self.path} was made with another config ({'; '.join(lines)}): "
                    "use another --workdir, or give the stored values"
                )
        self.write_json("config.json", config)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        folder = self.path / "checkpoints"
        steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
        return max(steps, default=None)


def link_stages(system: pathlib.Path, root: pathlib.Path, but: Container[str] = ()) -> None:
    """Puts a link to each stage of ``system``, those in ``but`` left out, where ``root`` has none of that name.

    The links are relative, so that both systems may be moved together.
    """
    root.mkdir(parents=True, exist_ok=True)
    for folder in sorted(system.iterdir()):
        link = root / folder.name
        if StageFolder(system, folder.name).exists() and folder.name not in but and not link.exists():
            link.unlink(missing_ok=True)  # a link that leads nowhere
            link.symlink_to(os.path.relpath(folder.resolve(), root.resolve()), target_is_directory=True)


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns one "field: stored X, wanted Y" for each field that differs and may not."""
    lines = []
    for key in sorted({*stored, *wanted}):
        if (not prefix and key in MAY_CHANGE) or (prefix.startswith("data.") and key == MAY_CHANGE_IN_DATA):
            continue
        old, new = (json.loads(json.dumps(tree.get(key))) for tree in (stored, wanted))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += difference(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: stored {json.dumps(old)}, wanted {json.dumps(new)}")
    return lines


class Checkpoints:
    """The checkpoints of one stage: asynchronous, atomic, the last ``keep`` preserved.

    Trees are saved side by side (params, ema, opt_state, stats), so that sampling reads the
    EMA weights alone.
    """

    def __init__(self, folder: StageFolder, keep: int = 2):
        self._folder = folder
        self._writer = None
        self._keep = keep

    def _open(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            self._writer = ocp.training.Checkpointer(
                (self._folder.path / "checkpoints").absolute(),
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
                context=_context(),
            )
        return self._writer

    def save(self, step: int, trees: Mapping[str, Any], data_state: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint and returns as soon as the arrays were copied.

        Raises:
          UserError: this one cannot be written, or the one before could not.
        """
        present = {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
        with self._explained():
            self._open().save_checkpointables_async(
                step, present, force=True, overwrite=True, custom_metadata={"data_state": dict(data_state)}
            )

    def save_lean(self, step: int, trees: Mapping[str, Any]) -> None:
        """Writes a checkpoint of numpy arrays as they lie in memory, and returns when it is on disk.

        The arrays are neither copied nor compressed: either takes as much memory again as they do.

        Raises:
          UserError: it cannot be written.
        """
        context = _context()
        context.memory.deepcopy_host_arrays = False
        context.array.saving.use_compression = False
        with context:
            self.save(step, trees, {})
            self.wait()

    def wait(self) -> None:
        """Returns when every started checkpoint is on disk. UserError when one could not be written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._explained():
                writer.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
            reason = str(error).splitlines()[0]
            raise UserError(
                f"a checkpoint cannot be written to {self._folder.path} ({reason}): "
                "make room or change permissions, and give the same command again"
            ) from error

    def restore(self, abstract: Mapping[str, Any]) -> Restored | None:
        """Reads the newest checkpoint that can be read.

        Args:
          abstract: trees of ShapeDtypeStruct with shardings, by the names they were saved under.

        Returns:
          None when there is no checkpoint at all.

        Raises:
          UserError: checkpoints exist and none can be read.
        """
        wanted = {name: tree for name, tree in abstract.items() if jax.tree.leaves(tree)}
        folder = self._folder.path / "checkpoints"
        steps = sorted((int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()), reverse=True)
        skipped = []
        for step in steps:
            path = (folder / str(step)).absolute()
            try:
                trees, data_state = _read(path, wanted)
            except _Damaged as damage:
                skipped.append(f"checkpoint {path} cannot be read ({damage})")
                continue
            trees |= {name: tree for name, tree in abstract.items() if name not in wanted}
            return Restored(step, trees, data_state, tuple(skipped))
        if skipped:
            raise UserError(
                f"no checkpoint of stage {self._folder.stage} can be read: {'; '.join(skipped)}; "
                f"restore one, or remove {self._folder.path} and train it again"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints newer than ``step`` (damaged ones, before writing goes on)."""
        folder = self._folder.path / "checkpoints"
        for path in folder.glob("[0-9]*"):
            if path.name.isdigit() and int(path.name) > step:
                shutil.rmtree(path)


def _context() -> ocp.Context:
    """Returns how every checkpoint is written."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = LEAST_SLICE
    return context


class _Damaged(Exception):
    """A checkpoint that cannot be read; its one line says why."""


def _read(path: pathlib.Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a checkpoint's trees and data position."""
    with warnings.catch_warnings(), _hushed():
        # orbax forgets its own coroutines when a file is damaged; they are collected here and not later, aloud
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            trees = ocp.load_checkpointables(path, wanted)
            return trees, ocp.checkpointables_metadata(path).custom_metadata["data_state"]
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            while error.__cause__ or error.__context__:
                error = error.__cause__ or error.__context__
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        time.sleep(GRACE)
        gc.collect()
    raise _Damaged(reason)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Sends standard error nowhere: the threads of orbax write a traceback there for each array that fails."""
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
