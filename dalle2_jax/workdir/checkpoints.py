"""The checkpoints of one stage: asynchronous, atomic, with digests."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Container, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from dalle2_jax.errors import UserError
from dalle2_jax.workdir import digests, orbax_io
from dalle2_jax.workdir.folder import StageFolder, entries, saved_steps

_UNFINISHED, _REMOVED, _DAMAGED = ".unfinished", ".removed", ".damaged"
"""Suffixes of a checkpoint that is being written or deleted, and of one that was found to be damaged and set aside."""


_LEFT_OVER = (f"*{_UNFINISHED}*", f"*{_REMOVED}", "*.orbax-checkpoint-tmp*")
"""What a killed process may leave behind in ``checkpoints``, here or by earlier versions."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: its step, the trees asked for, the data position, and what was skipped."""

    step: int
    trees: dict[str, Any]
    data_state: dict[str, Any]
    skipped: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one stage: asynchronous, atomic, with digests, the last ``keep`` preserved.

    Trees are saved side by side (params, ema, opt_state, stats), so that sampling reads the
    EMA weights alone.
    """

    def __init__(self, folder: StageFolder, keep: int = 2):
        self._stage = folder
        self._folder = (folder.path / "checkpoints").absolute()
        self._keep = keep
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: concurrent.futures.Future[None] | None = None

    def save(self, step: int, trees: Mapping[str, Any], data_state: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint and returns as soon as the arrays were copied.

        Raises:
          UserError: this one cannot be written, or the one before could not.
        """
        self._save(step, trees, data_state, lean=False)

    def save_lean(self, step: int, trees: Mapping[str, Any]) -> None:
        """Writes a checkpoint of numpy arrays as they lie in memory, and returns when it is on disk.

        The arrays are neither copied nor compressed: either takes as much memory again as they do.

        Raises:
          UserError: it cannot be written.
        """
        self._save(step, trees, {}, lean=True)
        self.wait()

    def _save(self, step: int, trees: Mapping[str, Any], data_state: Mapping[str, Any], lean: bool) -> None:
        present = {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
        unfinished = self._folder / f"{step}{_UNFINISHED}"
        with self._explained():
            if self._thread is None:
                self._prepare()
                self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
            self._finish_pending()
            writing = orbax_io.start_writing(unfinished, present, data_state, lean)
            self._pending = self._thread.submit(self._commit, writing, unfinished, step)

    def _prepare(self) -> None:
        """Makes the folder, and clears it of what a killed process left there."""
        if jax.process_index() == 0:
            self._stage.reject_links()
            if not os.path.lexists(self._folder):
                self._folder.mkdir(parents=True)
            for path in entries(self._folder):
                if any(path.match(pattern) for pattern in _LEFT_OVER):
                    shutil.rmtree(path, ignore_errors=True)

    def _commit(self, writing: Any, unfinished: pathlib.Path, step: int) -> None:
        """Waits until the arrays are written, adds their digests, and gives the checkpoint its name."""
        try:
            writing.result()
        except Exception:
            time.sleep(orbax_io.GRACE)  # orbax reports the first file that failed while it still writes the others
            raise
        if jax.process_index() == 0:
            digests.write(unfinished)
            if (self._folder / str(step)).exists():
                self._remove(step)
            os.rename(unfinished, self._folder / str(step))
            for old in saved_steps(self._folder)[self._keep :]:
                self._remove(old)

    def _remove(self, step: int) -> None:
        """Deletes a checkpoint; a partly deleted one does not look complete."""
        removed = self._folder / f"{step}{_REMOVED}"
        os.rename(self._folder / str(step), removed)
        shutil.rmtree(removed)

    def _finish_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def wait(self) -> None:
        """Returns when every started checkpoint is on disk. UserError when one could not be written."""
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                with self._explained():
                    self._finish_pending()
            finally:
                thread.shutdown()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
            reason = str(error).splitlines()[0]
            raise UserError(
                f"a checkpoint cannot be written to {self._stage.path} ({reason}): "
                "make room or change permissions, and give the same command again"
            ) from error

    def restore(self, abstract: Mapping[str, Any], optional: Container[str] = ()) -> Restored | None:
        """Reads the newest checkpoint that is not damaged, and checks its files against their digests.

        Args:
          abstract: trees of ShapeDtypeStruct with shardings, by the names they were saved under.
          optional: names that checkpoints of earlier releases lack; they are then missing in the result too.

        Returns:
          None when there is no checkpoint at all.

        Raises:
          UserError: checkpoints exist and all are damaged; or one cannot be read now, for another reason than damage.
        """
        self._stage.reject_links()
        requested = {name: tree for name, tree in abstract.items() if jax.tree.leaves(tree)}
        skipped = []
        for step in saved_steps(self._folder):
            path = self._folder / str(step)
            try:
                there = {
                    name: tree for name, tree in requested.items() if name not in optional or (path / name).exists()
                }
                trees, data_state = orbax_io.read(path, there)
            except digests.Damaged as damage:
                skipped.append(f"checkpoint {path} cannot be read ({damage})")
                continue
            trees |= {name: tree for name, tree in abstract.items() if name not in requested}
            return Restored(step, trees, data_state, tuple(skipped))
        if skipped:
            raise UserError(
                f"no checkpoint of stage {self._stage.stage} can be read: {'; '.join(skipped)}; "
                f"restore one, or remove {self._stage.path} and train it again"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Sets the checkpoints newer than ``step`` aside, which are damaged: renames them to ``STEP.damaged``.

        All processes must call it.
        """
        if jax.process_index() == 0:
            for damaged in (other for other in saved_steps(self._folder) if other > step):
                name, number = f"{damaged}{_DAMAGED}", 2
                while os.path.lexists(self._folder / name):
                    name, number = f"{damaged}{_DAMAGED}-{number}", number + 1
                os.rename(self._folder / str(damaged), self._folder / name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self._folder}: damaged checkpoints are set aside")
