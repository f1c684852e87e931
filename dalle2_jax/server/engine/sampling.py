"""What the engine runs: requests become rows of `system.rows`, and rows go through the stages of their system."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from dalle2_jax.server.engine.engine import Listener
from dalle2_jax.server.engine.queue import Finished, Item, Step
from dalle2_jax.server.engine.systems import Systems
from dalle2_jax.system.cascade import PRIORS
from dalle2_jax.system.options import SampleOptions
from dalle2_jax.system.rows import COMMANDS, Row, RowSampler, until
from dalle2_jax.system.system import System

MAX_PROGRAMS = 500
"""Settings and batch sizes whose programs are in memory, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A request to a system.

    Attributes:
      system: its name.
      command: of ``system.rows.COMMANDS``, whose results are images; or of `ANSWERS`, which have one result.
      arguments: of the command.
      options: of sampling.
      side: of the images, in pixels; None for the largest.
      observed: whether the progress of single steps, with previews, is reported. Rows that are observed and rows that
        are not run in different batches, as their programs differ.
    """

    system: str
    command: str
    arguments: Mapping[str, Any]
    options: SampleOptions = dataclasses.field(default_factory=SampleOptions)
    side: int | None = None
    observed: bool = False

    def item(self) -> Item:
        """Returns the first step of the request."""
        return Item(Step(("prepare", id(self)), 0, batched=False), self)


class Generated(NamedTuple):
    """An image, and what is needed to generate it again."""

    pixels: UInt8[np.ndarray, "H W 3"]
    provenance: dict[str, Any]


class Progress(NamedTuple):
    """Where an image is.

    Attributes:
      stage: the stage that is sampled.
      step: the steps that are done, from 0.
      steps: of the stage; 0 for a stage that reports no steps.
      x_0: the image that is predicted; None at step 0.
    """

    stage: str
    step: int
    steps: int
    x_0: UInt8[np.ndarray, "H W 3"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _RowState:
    """A row between two stages."""

    sampler: RowSampler
    row: Row
    provenance: dict[str, Any]
    observed: bool

    def item(self, rank: int, position: int) -> Item:
        group = (self.sampler.group(self.row), self.observed)
        return Item(Step(group, rank), self, position)


class CascadeRunner:
    """Runs rows of loaded systems; it is the engine's `Runner`.

    Every new setting that decides a program compiles one. After `MAX_PROGRAMS` of them all are dropped from memory, so
    that clients who vary their settings cannot fill it; those in JAX's cache on disk are not compiled again.
    """

    def __init__(self, systems: Systems):
        self._systems = systems
        self._programs: set[Hashable] = set()

    def run(self, items: Sequence[Item], size: int, report: Listener | None) -> list[list[Item | Finished]]:
        """See `Runner`."""
        if not items[0].step.batched:
            return [self._prepare(item.state) for item in items]
        return self._sample(items, size, report)

    def _prepare(self, task: Task) -> list[Item | Finished]:
        """Returns the rows of a request."""
        system = self._systems.get(task.system)
        if task.command in ANSWERS:
            return [Finished(ANSWERS[task.command](system, **task.arguments))]
        made = COMMANDS[task.command](system, task.options, **task.arguments)
        made = until(made, task.side)
        about = {**made.provenance, "system": task.system}
        items: list[Item | Finished] = []
        for position, row in enumerate(made.rows):
            mine = {**about, "pictures": [about["pictures"][position]]}
            items.append(_RowState(made.sampler, row, mine, task.observed).item(1, position))
        return items

    def _sample(self, items: Sequence[Item], size: int, report: Listener | None) -> list[list[Item | Finished]]:
        """Runs the next stage of rows."""
        states: list[_RowState] = [item.state for item in items]
        sampler, stage = states[0].sampler, states[0].row.remaining[0]
        size = math.ceil(size / sampler.devices) * sampler.devices
        self._programs.add((items[0].step.group, size))
        if len(self._programs) > MAX_PROGRAMS:
            jax.clear_caches()
            self._programs.clear()
        callback = None
        if report is not None:
            is_prior = stage in PRIORS.values()
            steps = 0 if is_prior else sampler.steps(stage)
            for number in range(len(items)):
                report(number, Progress(stage, 0, steps))
            if states[0].observed and not is_prior:
                callback = _step_callback(len(items), stage, steps, report)
        rows = sampler.run([state.row for state in states], size, callback)
        return [[_after(item, state, row)] for item, state, row in zip(items, states, rows, strict=True)]


def _after(item: Item, state: _RowState, row: Row) -> Item | Finished:
    if not row.remaining:
        return Finished(Generated(row.pixels, state.provenance), item.position)
    return dataclasses.replace(state, row=row).item(item.step.rank + 1, item.position)


def _step_callback(count: int, stage: str, steps: int, report: Listener) -> Any:
    """Returns a `StepCallback` that reports the predicted image of each row."""

    def on_step(step: int, x_0: np.ndarray) -> None:
        for number in range(count):
            report(number, Progress(stage, step, steps, x_0[number]))

    return on_step


def embed(system: System, texts: Sequence[str] = (), images: Sequence[Any] = ()) -> dict[str, np.ndarray]:
    """Returns the CLIP embeddings of captions and images, in the space of the system's embedding contract."""
    found = {}
    if texts:
        found["text"] = system.embed_text(list(texts))
    if images:
        found["image"] = system.embed_image(list(images))
    return found


def describe(system: System) -> dict[str, Any]:
    """Returns the sizes that a system generates, and how its stages are sampled."""
    sampler = RowSampler(system.call("text2image", {}, system.embeds_images))
    sides = [sampler.side(name) for name in sampler.stage_names if name not in PRIORS.values()]
    names = {name: "prior" if name in PRIORS.values() else name for name in sampler.stage_names}
    return {
        "sizes": [f"{side}x{side}" for side in sides],
        "sampling": {names[name]: dataclasses.asdict(config) for name, config in sampler.sampling.items()},
    }


ANSWERS: Mapping[str, Callable[..., Any]] = {"embed": embed, "describe": describe}
"""Requests that generate no images: name -> function of the system and the arguments."""


def warm_up_tasks(system: str, sizes: Sequence[int]) -> list[Task]:
    """Returns requests that load a system, and compile its stages for batch sizes with and without previews."""
    load = Task(system, "embed", {})
    options = [SampleOptions(num=size, seed=0) for size in sizes]
    arguments = {"prompt": "an image"}
    return [load, *(Task(system, "text2image", arguments, o, observed=seen) for o in options for seen in (False, True))]
