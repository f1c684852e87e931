"""`search_plans`: the smallest slice on which a train step fits, and the fastest plan on it.

A slice can be used in many ways: meshes, recomputation of activations (``remat``) and, where the optimizer has it,
accumulation of gradients over micro-batches (``optim.accumulate``). Each costs a compilation, so few are tried:

1. The smallest slice is found with the settings that need the least memory. Slices too small for the state alone are
   left uncompiled. One of the next two usually fits; otherwise the larger ones are tried by bisection.
2. On it, meshes whose state alone exceeds the memory are left uncompiled. On each other mesh, and for each
   recomputation from the fastest on, the fewest micro-batches that fit are found by bisection; more recomputation is
   tried only where one batch in one piece does not fit.
3. Tensor parallelism sends activations at every layer; it is tried where nothing fits without it.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import ConfigError, UsageError
from dalle2_jax.planning import planner, program
from dalle2_jax.planning.chips import CHIPS
from dalle2_jax.planning.result import Plan, shown_bytes
from dalle2_jax.planning.topology import AXES, all_meshes, check_name, find_topology, shown_mesh
from dalle2_jax.training.configs import OptimConfig

REMAT = ((False, True), ("none", "dots", "blocks"))
"""Values of a field ``remat``, a switch or a policy, from the fastest to the one that needs the least memory."""

ACCUMULATE = "accumulate"
"""The field of the section ``optim`` with the number of micro-batches."""

MAX_TENSOR = 8

Sizes = tuple[int, int, int]


class Settings(NamedTuple):
    """What a search changes of an experiment; None leaves a field as it is."""

    remat: bool | str | None = None
    accumulate: int | None = None

    def overrides(self, experiment: Experiment) -> dict[str, Any]:
        """Returns the changed fields of an experiment by their dotted paths."""
        remat = dict.fromkeys(_paths(experiment.to_json(), "remat"), self.remat)
        named = {**remat, f"optim.{ACCUMULATE}": self.accumulate}
        return {name: value for name, value in named.items() if value is not None}

    def apply(self, experiment: Experiment) -> Experiment:
        """Returns the experiment with these settings. ConfigError for a value that it does not take."""
        content = experiment.to_json()
        if self.remat is not None:
            content = planner.replaced(content, "remat", self.remat)
        if self.accumulate is not None:
            content["optim"] = {**content["optim"], ACCUMULATE: self.accumulate}
        return Experiment.from_json(content)


class Trial(NamedTuple):
    """One compilation: what was changed, also as fields by their dotted paths, and the plan."""

    settings: Settings
    overrides: dict[str, Any]
    plan: Plan


class Compiler(NamedTuple):
    """How a search finds out what it needs to know; replaced in tests.

    Attributes:
      compile: (experiment, topology, mesh) -> plan.
      state_bytes: (experiment, topology, mesh) -> bytes of the state on one device, without compilation; infinite for
        a mesh into which the topology cannot be divided.
      available: topology -> bytes that programs can use on one device.
    """

    compile: Callable[[Experiment, str, Sizes], Plan]
    state_bytes: Callable[[Experiment, str, Sizes], float]
    available: Callable[[str], int]


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
      smallest: the plan that needs the least memory on the smallest slice that fits; None if none fits.
      fastest: the fastest plan on that slice; None if none fits, or if it was not searched for.
      trials: all compilations, in their order.
    """

    smallest: Trial | None
    fastest: Trial | None
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the result as a JSON object."""
        return {
            "smallest": self.smallest and _trial_json(self.smallest),
            "fastest": self.fastest and _trial_json(self.fastest),
            "trials": [_trial_json(trial) for trial in self.trials],
        }

    def table(self) -> str:
        """Returns a line for each compilation, and the two results."""
        lines = [f"{'topology':12} {'data':>5} {'fsdp':>5} {'tensor':>6} {'peak':>10} {'step s':>10}  settings"]
        for _, overrides, plan in self.trials:
            sizes = " ".join(f"{plan.mesh[axis]:>{width}}" for axis, width in zip(AXES, (5, 5, 6), strict=True))
            peak = shown_bytes(plan.memory.peak)
            seconds = f"{plan.time.serial:.4g}" if plan.time else "-"
            named = " ".join(f"{name}={value}" for name, value in overrides.items()) or "-"
            lines.append(
                f"{plan.topology:12} {sizes} {peak:>10} {seconds:>10}  {named}{'' if plan.fits else ' (does not fit)'}"
            )
        for name, trial in (("smallest slice", self.smallest), ("fastest plan", self.fastest)):
            if trial or not self.smallest:
                lines.append(f"{name}: {_options(trial) if trial else 'none fits'}")
        return "\n".join(lines)


def search_plans(
    config: str | Experiment,
    topology: str,
    *,
    clip: Experiment | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    full: bool = False,
    fastest: bool = True,
    progress: Callable[[Trial], None] | None = None,
) -> Search:
    """Searches meshes and settings for the smallest slice that fits a train step, and for the fastest plan on it.

    Args:
      config: as of `planner.plan`.
      topology: the name of a chip, "v5p", to find the slice; or of one slice, "v5p:8x8x8".
      clip: as of `planner.plan`.
      batch_size: as of `planner.plan`.
      memory: as of `planner.plan`.
      full: as of `planner.plan`.
      fastest: whether the fastest plan is searched for, too, which takes many more compilations.
      progress: called with each compilation.

    Raises:
      UsageError, ConfigError, CannotTell: as `planner.plan`.
    """
    planned, clip = planner.read_experiments(config, clip)
    if batch_size is not None:
        planned = dataclasses.replace(planned, run=dataclasses.replace(planned.run, batch_size=batch_size))

    def compiled(experiment: Experiment, name: str, sizes: Sizes) -> Plan:
        return planner.compile_plan(experiment, clip, find_topology(name), sizes, memory=memory, full=full)

    def state_bytes(experiment: Experiment, name: str, sizes: Sizes) -> float:
        try:
            mesh = find_topology(name).mesh(sizes)
        except ConfigError:
            return math.inf
        return program.state_bytes(experiment, clip, mesh)

    def available(name: str) -> int:
        chip, _ = check_name(name)
        if memory is None and chip is None:
            raise UsageError(f"{name} has no memory limit: a search needs one, as in --memory_gib 16")
        return memory if memory is not None else int(chip.memory * chip.usable) if chip else 0

    names = [topology] if ":" in topology else list(slices(topology))
    return find(planned, names, Compiler(compiled, state_bytes, available), fastest, progress)


def slices(chip: str) -> tuple[str, ...]:
    """Returns the topologies of a chip, the smallest first. UsageError if there is no such chip."""
    if chip not in CHIPS:
        check_name(chip)  # raises
        raise UsageError(f"{chip} has no slices to search: name one, as in cpu:8")
    return CHIPS[chip].topologies


def find(
    experiment: Experiment,
    topologies: Sequence[str],
    compiler: Compiler,
    fastest: bool = True,
    progress: Callable[[Trial], None] | None = None,
) -> Search:
    """Returns the result of a search over topologies, the smallest first; see the module."""
    trials: list[Trial] = []
    sharded = {name: _most_sharded(experiment.run.batch_size, device_count(name)) for name in topologies}
    dividing = {name: mesh for name, mesh in sharded.items() if mesh is not None}

    def holds_state(name: str, sizes: Sizes) -> bool:
        return compiler.state_bytes(experiment, name, sizes) <= compiler.available(name)

    def attempt(settings: Settings, name: str, sizes: Sizes) -> Trial:
        plan = compiler.compile(settings.apply(experiment), name, sizes)
        trial = Trial(settings, settings.overrides(experiment), plan)
        trials.append(trial)
        if progress is not None:
            progress(trial)
        return trial

    def least(name: str) -> Trial | None:
        """Returns the trial of a topology with the settings that need the least memory."""
        mesh = dividing[name]
        pieces = micro_batches(experiment, mesh)
        trial = attempt(Settings(remat_values(experiment)[-1], pieces[-1]), name, mesh)
        return trial if trial.plan.fits else None

    possible = (name for name, mesh in dividing.items() if holds_state(name, mesh))
    smallest = next(filter(None, map(least, itertools.islice(possible, 2))), None) or first_that_fits(
        least, [*possible]
    )
    if smallest is None or not fastest:
        return Search(smallest, None, tuple(trials))
    name = smallest.plan.topology
    fitting = [smallest]
    for tensor in (False, True):
        for mesh in meshes(experiment.run.batch_size, device_count(name), tensor):
            if holds_state(name, mesh):
                fitting += _on_mesh(experiment, mesh, lambda settings, mesh=mesh: attempt(settings, name, mesh))
        if len(fitting) > 1:
            break
    return Search(smallest, min(fitting, key=_cost), tuple(trials))


def _on_mesh(experiment: Experiment, mesh: Sizes, attempt: Callable[[Settings], Trial]) -> Iterator[Trial]:
    """Yields, for each recomputation from the fastest on, the trial with the fewest micro-batches that fits."""
    for remat in remat_values(experiment):
        pieces = micro_batches(experiment, mesh)
        found = first_that_fits(lambda count, remat=remat: _fitting(attempt(Settings(remat, count))), pieces)
        if found is not None:
            yield found
            if found.settings.accumulate in (None, 1):
                return


def _fitting(trial: Trial) -> Trial | None:
    return trial if trial.plan.fits else None


def first_that_fits(test: Callable[[Any], Trial | None], options: Sequence[Any]) -> Trial | None:
    """Returns the trial of the first option that fits, by bisection: each option needs less memory than the one before.

    Args:
      test: option -> its trial, or None if it does not fit.
      options: in order.
    """
    low, high, best = 0, len(options), None
    while low < high:
        middle = (low + high) // 2
        found = test(options[middle])
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def _cost(trial: Trial) -> tuple[float, float]:
    plan = trial.plan
    moved = plan.traffic.matrix_bytes + plan.traffic.other_bytes if plan.traffic else 0.0
    return (plan.time.serial, 0.0) if plan.time else (plan.hardware_flops, moved)


# --- what can be tried ----------------------------------------------------------------------


def device_count(topology: str) -> int:
    """Returns the number of devices of a topology, from its name."""
    count = 1
    for size in check_name(topology)[1].split("x"):
        count *= int(size)
    return count


def meshes(batch_size: int, devices: int, tensor: bool) -> list[Sizes]:
    """Returns the meshes over which a batch divides, those that shard parameters least first.

    Args:
      batch_size: of all devices.
      devices: how many there are.
      tensor: whether the axis ``tensor`` has more than one device, and at most `MAX_TENSOR`; otherwise it has one.
    """
    found = [
        mesh
        for mesh in all_meshes(devices)
        if batch_size % (mesh[0] * mesh[1]) == 0 and (1 < mesh[2] <= MAX_TENSOR if tensor else mesh[2] == 1)
    ]
    return sorted(found, key=lambda mesh: (mesh[2], mesh[1]))


def _most_sharded(batch_size: int, devices: int) -> Sizes | None:
    """Returns the mesh with the most devices on ``fsdp``; None if the batch divides over no mesh."""
    found = meshes(batch_size, devices, False) or meshes(batch_size, devices, True)
    return max(found, key=lambda mesh: mesh[1]) if found else None


def remat_values(experiment: Experiment) -> list[bool | str | None]:
    """Returns the values that the fields ``remat`` of an experiment take, the fastest first; [None] without any."""
    if not [*_paths(experiment.to_json(), "remat")]:
        return [None]
    accepted = [[value for value in values if _accepts(experiment, value)] for values in REMAT]
    return list(accepted[-1] or accepted[0])


def _accepts(experiment: Experiment, value: bool | str) -> bool:
    try:
        Settings(remat=value).apply(experiment)
    except ConfigError:
        return False
    return True


def micro_batches(experiment: Experiment, mesh: Sizes) -> list[int | None]:
    """Returns the numbers of micro-batches that a batch divides into on a mesh; [None] without accumulation."""
    if ACCUMULATE not in {field.name for field in dataclasses.fields(OptimConfig)}:
        return [None]
    rows, counts = experiment.run.batch_size // (mesh[0] * mesh[1]), []
    while not counts or rows % (2 * counts[-1]) == 0:
        counts.append(2 * counts[-1] if counts else 1)
    return counts


def _paths(content: Mapping[str, Any], name: str, prefix: str = "") -> Iterator[str]:
    """Yields the dotted path of every field of a name that is not null."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _paths(value, name, f"{prefix}{key}.")
        elif key == name and value is not None:
            yield f"{prefix}{key}"


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {"settings": trial.overrides, "plan": trial.plan.to_json()}


def _options(trial: Trial) -> str:
    """Returns the options of the command that repeats a trial."""
    plan = trial.plan
    mesh = shown_mesh(plan.mesh.values())
    changed = "".join(f" --set {name}={value}" for name, value in trial.overrides.items())
    return f"--topology {plan.topology} --mesh {mesh}{changed}"
