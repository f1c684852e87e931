"""`Engine`: one worker thread that owns the devices, and runs the items of all requests in shared batches.

Batching is continuous between the *stages* of the cascade: an image that leaves the prior joins all images that wait
for the same decoder settings, whichever requests they are from, and its slot in the next prior batch is free. Joining
between single denoising steps would need programs that take one step with a timestep per row, and a transfer to the
host after each. The loop of a stage is one ``lax.scan`` of static coefficients, the program that `System` runs too, so
that a served image is the image of ``dalle2 sample``.

A request is a `Ticket`. Cancelling it (a client that disconnects) removes its images before the next stage. Nothing
here depends on what an item is: a `Runner` advances items by one step.
"""

import concurrent.futures
import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.server.engine.queue import Entry, FairQueue, Finished, Item, Step

SIZES = (1, 2, 4, 8, 16)
"""Default batch sizes."""

_SMOOTHING = 0.9
"""Weight of the past in the mean time of an image."""

Listener = Callable[[int, Any], None]
"""Called in the worker thread with the position of an image and what the runner reports about it."""


class QueueFull(UserError):
    """More images wait than the queue holds.

    Attributes:
      retry_after: seconds until there is probably space.
    """

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Closing(UserError):
    """The engine is shutting down: the request was not started."""


class Runner(Protocol):
    """Advances items by one step; called in the worker thread only."""

    def run(self, items: Sequence[Item], size: int, report: Listener | None) -> Sequence[Sequence[Item | Finished]]:
        """Runs the step that items wait for.

        Args:
          items: items whose steps are equal.
          size: of the batch: at least the number of items.
          report: called with the number of an item among ``items`` and its progress; None if no one listens.

        Returns:
          What each item becomes: its next state, several items, or a result.
        """
        ...


class Monitor(Protocol):
    """What the engine tells about itself: the metrics of a server."""

    def batch(self, step: Step, count: int, size: int, seconds: float) -> None:
        """A batch of ``count`` items has run at a size."""
        ...

    def finished(self, images: int, waited: float, seconds: float) -> None:
        """A request has its images, after it waited to be started, and after seconds in all."""
        ...


class Ticket:
    """A request that was accepted.

    Attributes:
      owner: whose share of the engine it takes.
      images: how many images, or other results, it gives.
      future: the list of results, in order; cancel it to cancel the request.
    """

    def __init__(self, owner: str, images: int, listener: Listener | None):
        self.owner, self.images, self.listener = owner, images, listener
        self.future: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
        self.submitted = time.monotonic()
        self.first_tag = 0.0
        self.started: float | None = None
        self._results: dict[int, Any] = {}

    def cancel(self) -> None:
        """Takes the request out of the engine, unless it is done."""
        self.future.cancel()

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error, unless it is done."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_exception(error)

    def collect(self, finished: Finished) -> bool:
        """Adds a result; returns whether the request is complete with it."""
        self._results[finished.position] = finished.value
        if len(self._results) < self.images:
            return False
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_result([self._results[position] for position in sorted(self._results)])
            return True
        return False


class Engine:
    """Runs requests on a worker thread, which starts with the first `start`.

    Args:
      runner: advances items.
      sizes: the batch sizes; a batch is padded to the next one.
      capacity: images that are accepted and not finished, at most.
      monitor: observes batches and requests.
    """

    def __init__(
        self, runner: Runner, sizes: Sequence[int] = SIZES, capacity: int = 64, monitor: Monitor | None = None
    ):
        if not sizes or min(sizes) < 1 or capacity < 1:
            raise UsageError(f"batch sizes and capacity must be at least 1, got {tuple(sizes)} and {capacity}")
        self.sizes, self.capacity = tuple(sorted(set(sizes))), capacity
        self._runner, self._monitor = runner, monitor
        self._queue, self._pending = FairQueue(), set[Ticket]()
        self._changed = threading.Condition()
        self._closing = False
        self._image_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the worker thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that are accepted and not finished."""
        with self._changed:
            return sum(ticket.images for ticket in self._pending)

    @property
    def accepting(self) -> bool:
        """Whether requests are accepted: before `close`."""
        return not self._closing

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive()

    def submit(self, owner: str, item: Item, images: int = 1, listener: Listener | None = None) -> Ticket:
        """Accepts a request.

        Args:
          owner: requests of different owners get equal shares of the engine.
          item: its first step.
          images: how many results it gives.
          listener: is called with the progress of each image; None needs none.

        Raises:
          QueueFull: the queue is full.
          Closing: the engine was closed.
        """
        ticket = Ticket(owner, images, listener)
        with self._changed:
            if self._closing:
                raise Closing("the server is shutting down: try another one")
            self._drop_cancelled()
            waiting = sum(other.images for other in self._pending)
            if waiting + images > self.capacity and self._pending:
                seconds = max(1, math.ceil(self._image_seconds * min(images, waiting)))
                raise QueueFull(f"{waiting} images wait already, of at most {self.capacity}: try again later", seconds)
            ticket.first_tag = self._queue.admit(owner, images)
            self._pending.add(ticket)
            self._queue.add(ticket, [item], ticket.first_tag)
            self._changed.notify_all()
        ticket.future.add_done_callback(lambda _: self._wake())
        return ticket

    def close(self, timeout: float | None = None) -> bool:
        """Ends the engine: requests that were started are finished, the others end with `Closing`.

        Args:
          timeout: seconds to wait for those that were started, which then end with `Closing` too.

        Returns:
          Whether the worker thread has ended.
        """
        with self._changed:
            self._closing = True
            waiting = [ticket for ticket in self._pending if ticket.started is None]
            self._changed.notify_all()
        for ticket in waiting:
            ticket.fail(Closing("the server is shutting down: try another one"))
        if self._thread.ident is not None:
            self._thread.join(timeout)
        with self._changed:
            unfinished = list(self._pending)
        for ticket in unfinished:
            ticket.fail(Closing("the server was shut down before the images were finished"))
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _drop_cancelled(self) -> None:
        """Removes what belongs to requests that are cancelled, failed or complete."""
        done = {ticket for ticket in self._pending if ticket.future.done()}
        if done:
            self._pending -= done
            self._queue.discard(lambda entry: entry.ticket in done)

    def _next_batch(self) -> list[Entry] | None:
        """Waits for the next batch; None when the engine is closed and nothing is left to run."""
        with self._changed:
            while True:
                self._drop_cancelled()
                batch = self._queue.take(self.sizes)
                if batch:
                    now = time.monotonic()
                    for entry in batch:
                        entry.ticket.started = entry.ticket.started or now
                    return batch
                if self._closing:
                    return None
                self._changed.wait()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            items = [entry.item for entry in batch]
            size = next(size for size in self.sizes if size >= len(items)) if items[0].step.batched else 1
            begun = time.monotonic()
            try:
                after = self._runner.run(items, size, self._reporter(batch))
            except Exception as error:  # the worker outlives any request
                for entry in batch:
                    entry.ticket.fail(error)
                continue
            seconds = time.monotonic() - begun
            if self._monitor is not None:
                self._monitor.batch(items[0].step, len(items), size, seconds)
            self._advance(batch, after)

    def _reporter(self, batch: list[Entry]) -> Listener | None:
        if all(entry.ticket.listener is None for entry in batch):
            return None

        def report(number: int, progress: Any) -> None:
            entry = batch[number]
            if entry.ticket.listener is not None and not entry.ticket.future.done():
                entry.ticket.listener(entry.item.position, progress)

        return report

    def _advance(self, batch: list[Entry], after: Sequence[Sequence[Item | Finished]]) -> None:
        """Queues the next steps, and completes the requests whose last result is there."""
        finished = []
        with self._changed:
            for entry, successors in zip(batch, after, strict=True):
                items = [item for item in successors if isinstance(item, Item)]
                self._queue.add(entry.ticket, items, entry.ticket.first_tag)
                finished += [(entry.ticket, item) for item in successors if isinstance(item, Finished)]
        for ticket, result in finished:
            if ticket.collect(result):
                self._completed(ticket)

    def _completed(self, ticket: Ticket) -> None:
        now = time.monotonic()
        started = ticket.started or now
        an_image = (now - started) / ticket.images
        self._image_seconds = _SMOOTHING * self._image_seconds + (1 - _SMOOTHING) * an_image
        if self._monitor is not None:
            self._monitor.finished(ticket.images, started - ticket.submitted, now - ticket.submitted)
