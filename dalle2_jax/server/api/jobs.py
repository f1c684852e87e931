"""Jobs: requests that are answered later, with their progress as server-sent events."""

import asyncio
import contextlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from dalle2_jax.server.api.errors import ApiError, from_exception, too_many
from dalle2_jax.server.api.payload import encode_png, to_base64
from dalle2_jax.server.engine.sampling import Progress

MAX_JOBS, MAX_BYTES = 1_000, 2**28
"""Jobs that are kept, finished or not; bytes of the answers and previews of finished ones, about."""

_INTERVAL, _HEARTBEAT = 0.1, 15.0
"""Seconds between two events of an image, and between two signs of life."""


class Job:
    """A request that is answered later. Used in the event loop only.

    Attributes:
      id: unpredictable.
      owner: who may see it.
      images: how many it generates.
      result: the answer; None until it is done.
      error: None unless it failed.
    """

    def __init__(self, owner: str, images: int):
        self.id, self.owner, self.images = secrets.token_hex(16), owner, images
        self.created = time.time()
        self.result: dict[str, Any] | None = None
        self.error: ApiError | None = None
        self._progress: dict[int, tuple[int, Progress]] = {}
        self._version = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        """Whether it has a result or an error."""
        return self.result is not None or self.error is not None

    @property
    def status(self) -> str:
        """ "queued", "running", "done", "failed" or "cancelled"."""
        if self.error is not None:
            return "cancelled" if self.error.code == "cancelled" else "failed"
        return "done" if self.result is not None else "running" if self._progress else "queued"

    @property
    def nbytes(self) -> int:
        """About the bytes of its answer and previews."""
        previews = [progress.x_0.nbytes for _, progress in self._progress.values() if progress.x_0 is not None]
        items = self.result["data"] if self.result else ()
        return sum(previews) + sum(len(text) for item in items for text in item.values())

    def run(self, work: Awaitable[dict[str, Any]]) -> None:
        """Waits for the answer in the background."""
        self._task = asyncio.ensure_future(self._finish(work))

    async def _finish(self, work: Awaitable[dict[str, Any]]) -> None:
        try:
            self.result = await work
        except asyncio.CancelledError:
            self.error = ApiError(499, "the job was cancelled", None, "cancelled")
        except Exception as error:
            self.error = from_exception(error)
        self._notify()

    def cancel(self) -> None:
        """Cancels the request, unless it is done."""
        if self._task is not None:
            self._task.cancel()

    def update(self, position: int, progress: Progress) -> None:
        """Records the progress of an image."""
        self._version += 1
        self._progress[position] = self._version, progress
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def describe(self) -> dict[str, Any]:
        """Returns the job as JSON types."""
        states = {position: progress for position, (_, progress) in sorted(self._progress.items())}
        return {
            "id": self.id,
            "object": "dalle2.job",
            "created": int(self.created),
            "status": self.status,
            "images": self.images,
            "progress": [_described(position, progress) for position, progress in states.items()],
            **({} if self.result is None else {"result": self.result}),
            **({} if self.error is None else self.error.body),
        }

    async def events(self) -> AsyncIterator[str]:
        """Yields server-sent events: "progress" of each image, with a preview where there is one; then "done" or
        "failed". Of several changes within a tenth of a second the last is sent.
        """
        seen = 0
        while True:
            changed, done = self._changed, self.done
            news = {at: state for at, (version, state) in sorted(self._progress.items()) if version > seen}
            seen = self._version
            for position, progress in news.items():
                event = _described(position, progress)
                if progress.x_0 is not None:
                    event["preview"] = to_base64(await asyncio.to_thread(encode_png, progress.x_0))
                yield _event("progress", event)
            if done:
                yield _event("done" if self.result is not None else "failed", self.describe())
                return
            try:
                await asyncio.wait_for(changed.wait(), _HEARTBEAT)
                await asyncio.sleep(_INTERVAL)
            except TimeoutError:
                yield ": waiting\n\n"


class Jobs:
    """The jobs of a server, for a limited time. Used in the event loop only."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def add(self, owner: str, images: int) -> Job:
        """Returns a new job.

        Raises:
          ApiError: 429, there are too many.
        """
        self._forget()
        if len(self._jobs) >= MAX_JOBS:
            raise too_many(f"{MAX_JOBS} jobs are running, the limit", 10, "too_many_jobs")
        job = Job(owner, images)
        self._jobs[job.id] = job
        return job

    def _forget(self) -> None:
        """Forgets finished jobs that have expired, and the oldest while all are too many or too large."""
        finished = [job for job in self._jobs.values() if job.done]
        total = sum(job.nbytes for job in finished)
        for job in finished:
            expired = time.time() - job.created > self._seconds
            if expired or total > MAX_BYTES or len(self._jobs) >= MAX_JOBS:
                total -= job.nbytes
                del self._jobs[job.id]

    def get(self, owner: str, name: str) -> Job:
        """Returns a job of an owner.

        Raises:
          ApiError: 404, there is none, or it is another owner's.
        """
        job = self._jobs.get(name)
        if job is None or job.owner != owner:
            raise ApiError(404, "there is no such job, or it has expired", "id", "job_not_found")
        return job

    def discard(self, job: Job) -> None:
        """Forgets a job that was not submitted."""
        with contextlib.suppress(KeyError):
            del self._jobs[job.id]


def _described(position: int, progress: Progress) -> dict[str, Any]:
    return {"index": position, "stage": progress.stage, "step": progress.step, "steps": progress.steps}


def _event(name: str, value: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"
