"""`plan`: compiles a program ahead of time for a topology, and reports what it needs."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dalle2_jax.config.experiment import Experiment, experiment
from dalle2_jax.errors import ConfigError, UsageError
from dalle2_jax.planning import program
from dalle2_jax.planning.estimate import estimate
from dalle2_jax.planning.flops import count_flops
from dalle2_jax.planning.hlo import read_traffic
from dalle2_jax.planning.program import Program, device_bytes
from dalle2_jax.planning.result import Memory, Plan
from dalle2_jax.planning.topology import AXES, Topology, find_topology, mesh_sizes
from dalle2_jax.training.sharding import MeshConfig

QUICK = {"exec_time_optimization_effort": -1.0}
"""Options of XLA's TPU compiler: several times quicker, with the same memory and other collectives."""

UNTUNED = {"xla_gpu_enable_triton_gemm": False}
"""Options of XLA's GPU compiler: matrix products of libraries, since others are chosen by timing them on a GPU."""


class CannotTell(UsageError):
    """A program that the compiler rejects for another reason than memory."""


def plan(
    config: str | Experiment,
    topology: str,
    *,
    clip: Experiment | None = None,
    mesh: Mapping[str, int] | None = None,
    batch_size: int | None = None,
    sample: bool = False,
    memory: int | None = None,
    full: bool = False,
) -> Plan:
    """Compiles a train step or the sampling of a batch for accelerators that need not be here.

    Args:
      config: FILE:STAGE, as in "configs/paper.py:decoder", or an experiment.
      topology: CHIP:SHAPE, as in "v5p:8x8x8", "h200:2x8" or "cpu:8"; see `planning.topology`.
      clip: the experiment of the CLIP that an experiment requires; by default that of the same page.
      mesh: sizes of "data", "fsdp" and "tensor", one of which may be -1 for all devices that are left; those that are
        not named are 1. By default the section ``mesh``.
      batch_size: of all devices; by default that of the experiment.
      sample: whether to plan the sampling of a batch instead of a train step.
      memory: bytes of a device that programs can use; by default the chip's.
      full: whether TPU programs are compiled with all optimizations: several times slower, with the same memory.

    Raises:
      UsageError: the topology or the page does not exist, or the compiler is not installed (`MissingCompiler`).
      ConfigError: the mesh does not fit the devices, or the batch the mesh; the message offers the nearest that does.
      CannotTell: the program does not compile, for another reason than memory.
    """
    planned, clip = read_experiments(config, clip)
    found = find_topology(topology)
    if batch_size is not None:
        planned = dataclasses.replace(planned, run=dataclasses.replace(planned.run, batch_size=batch_size))
    sizes = mesh_sizes(_mesh_config(planned, mesh), len(found.devices))
    check_batch(planned.run.batch_size, sizes)
    return compile_plan(planned, clip, found, sizes, sample=sample, memory=memory, full=full)


def read_experiments(config: str | Experiment, clip: Experiment | None = None) -> tuple[Experiment, Experiment | None]:
    """Returns an experiment and that of the CLIP that it requires, of the same page unless it is given."""
    if isinstance(config, Experiment):
        return config, clip
    planned = experiment(config)
    if clip is None and "clip" in planned.requires:
        clip = page_clip(config)
    return planned, clip


def page_clip(config: str) -> Experiment:
    """Returns the CLIP of the page FILE:STAGE; of FILE:STAGE,FORM that of the same form."""
    page, _, which = config.partition(":")
    return experiment(f"{page}:clip{''.join(which.partition(',')[1:])}")


def _mesh_config(planned: Experiment, mesh: Mapping[str, int] | None) -> MeshConfig:
    if mesh is None:
        return planned.mesh or MeshConfig()
    unknown = [name for name in mesh if name not in AXES]
    if unknown:
        raise ConfigError(f"mesh has no axis {unknown[0]!r}: its axes are {', '.join(AXES)}", "mesh")
    if any(size < 1 and size != -1 for size in mesh.values()) or [*mesh.values()].count(-1) > 1:
        raise ConfigError(f"mesh sizes {dict(mesh)} must be positive, with at most one -1", "mesh")
    return MeshConfig(**{"data": 1, **mesh})


def check_batch(batch_size: int, sizes: tuple[int, int, int]) -> None:
    """Raises ConfigError unless a batch divides over a mesh; the message offers the nearest batch that does."""
    ways = sizes[0] * sizes[1]
    if batch_size % ways:
        near = max(round(batch_size / ways), 1) * ways
        raise ConfigError(
            f"batch_size {batch_size} does not divide over data={sizes[0]} fsdp={sizes[1]}: "
            f"the nearest that does is --batch_size {near}",
            "batch_size",
        )


def compile_plan(
    planned: Experiment,
    clip: Experiment | None,
    topology: Topology,
    sizes: tuple[int, int, int],
    *,
    sample: bool = False,
    memory: int | None = None,
    full: bool = False,
) -> Plan:
    """Returns the plan of an experiment on a mesh of a topology; see `plan`."""
    mesh = topology.mesh(sizes)
    traced = _trace(planned, clip, mesh, sample)
    hardware = count_flops(traced.traced.jaxpr)
    plain = without_remat(planned)
    model = hardware if sample or plain == planned else count_flops(_trace(plain, clip, mesh, sample).traced.jaxpr)
    chip = topology.chip
    available = memory if memory is not None else chip and int(chip.memory * chip.usable)
    start = time.monotonic()
    options = {"tpu": None if full else QUICK, "cuda": UNTUNED}[chip.platform] if chip else None
    compiled, needed = _compile(traced, options)
    seconds = time.monotonic() - start
    measured = _measure(traced, compiled, needed, available)
    traffic = None if compiled is None else read_traffic(compiled.as_text() or "", mesh.size)
    return Plan(
        stage=planned.stage,
        program="sample" if sample else "train",
        topology=topology.name,
        devices=mesh.size,
        mesh=dict(zip(AXES, sizes, strict=True)),
        batch_size=planned.run.batch_size,
        steps=0 if sample else planned.run.total_steps,
        parameters=program.parameter_count(traced.parts["parameters"]),
        memory=measured,
        fits=False if compiled is None else _fits(measured),
        model_flops=model,
        hardware_flops=hardware,
        traffic=traffic,
        time=estimate(chip, mesh.size, traffic, model, hardware) if chip and traffic else None,
        compile_seconds=seconds,
    )


def _fits(memory: Memory) -> bool | None:
    return None if memory.available is None or memory.peak is None else memory.peak <= memory.available


def _trace(planned: Experiment, clip: Experiment | None, mesh: Mesh, sample: bool) -> Program:
    trace = program.sample_program if sample else program.train_program
    return trace(planned, clip, mesh)


def without_remat(planned: Experiment) -> Experiment:
    """Returns an experiment that recomputes no activations: every field ``remat`` is off."""
    content = planned.to_json()
    try:
        return Experiment.from_json(replaced(content, "remat", False))
    except ConfigError:  # policies have names
        return Experiment.from_json(replaced(content, "remat", "none"))


def replaced(content: Any, name: str, value: Any) -> Any:
    """Returns nested mappings with another value for every field of a name, unless it is null."""
    if not isinstance(content, Mapping):
        return content
    return {
        key: value if key == name and old is not None else replaced(old, name, value) for key, old in content.items()
    }


def _compile(traced: Program, options: dict[str, Any] | None) -> tuple[jax.stages.Compiled | None, int | None]:
    """Returns the compiled program, or None and the bytes it would need where the compiler runs out of memory."""
    try:
        return traced.traced.lower().compile(compiler_options=options), None
    except jax.errors.JaxRuntimeError as error:
        reason = str(error)
        if "RESOURCE_EXHAUSTED" not in reason:
            raise CannotTell(f"the program does not compile: {reason.splitlines()[0][:300]}") from error
        return None, needed_bytes(reason)


def needed_bytes(reason: str) -> int | None:
    """Returns the memory that XLA's message about too little of it names; None if it names none."""
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", reason)
    if used is None:
        return None
    number, unit = used[1] or used[3], used[2] or used[4]
    return int(float(number) * 1024 ** " KMGT".index(unit))


def _measure(
    traced: Program, compiled: jax.stages.Compiled | None, needed: int | None, available: int | None
) -> Memory:
    parts = {name: device_bytes(tree) for name, tree in traced.parts.items()}
    temporaries, peak = None, needed
    if compiled is not None:
        stats: Any = compiled.memory_analysis()
        temporaries = stats.temp_size_in_bytes
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        peak = stats.argument_size_in_bytes + results + temporaries
    return Memory(
        parameters=parts["parameters"],
        averages=parts.get("averages", 0),
        optimizer=parts.get("optimizer", 0),
        frozen=parts["frozen"],
        batch=parts["batch"],
        temporaries=temporaries,
        peak=peak,
        available=available,
    )
