"""The result of a plan, as a table and as JSON."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from dalle2_jax.files import write_atomically
from dalle2_jax.planning.estimate import DAY, Estimate
from dalle2_jax.planning.hlo import Traffic
from dalle2_jax.planning.topology import shown_mesh


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters: of the stage.
      averages: of its parameters (EMA) and statistics; 0 in sampling.
      optimizer: the moments; 0 in sampling.
      frozen: variables of the stages that it requires.
      batch: the inputs.
      temporaries: activations, gradients and workspace; None if the compiler ran out of memory before it knew.
      peak: arguments, results that replace none of them, and temporaries; None if the compiler does not tell.
      available: what programs can use; None for CPU devices.
    """

    parameters: int
    averages: int
    optimizer: int
    frozen: int
    batch: int
    temporaries: int | None
    peak: int | None
    available: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program needs on a topology.

    Attributes:
      stage: its name.
      program: "train" for one train step, "sample" for the sampling of one batch.
      topology: its name.
      devices: how many there are.
      mesh: sizes of the axes.
      batch_size: of all devices.
      steps: of the whole training run; 0 for sampling.
      parameters: trained, or sampled with.
      memory: on one device.
      fits: whether the peak is within the available memory; None if that is unknown.
      model_flops: of a step on all devices, without recomputation.
      hardware_flops: with it.
      traffic: of one device; None if the program did not compile.
      time: None for CPU devices, and if the program did not compile.
      compile_seconds: that compilation took here.
    """

    stage: str
    program: str
    topology: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    steps: int
    parameters: int
    memory: Memory
    fits: bool | None
    model_flops: float
    hardware_flops: float
    traffic: Traffic | None
    time: Estimate | None
    compile_seconds: float

    @property
    def device_days(self) -> tuple[float, float] | None:
        """Days of one device for the whole run, with everything overlapped and with nothing; None if unknown."""
        if self.time is None or not self.steps:
            return None
        scale = self.steps * self.devices / DAY
        return self.time.overlapped * scale, self.time.serial * scale

    @property
    def collectives(self) -> dict[str, tuple[int, float]]:
        """Kind of collective -> (runs in a step, bytes that one device sends)."""
        found: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        for each in self.traffic.collectives if self.traffic else ():
            runs, sent = found[each.kind]
            found[each.kind] = runs + each.runs, sent + each.sent
        return dict(found)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as a JSON object; bytes, FLOPs and seconds are not rounded."""
        content = dataclasses.asdict(self)
        if self.traffic is not None:
            moved = {name: content["traffic"][name] for name in ("matrix_bytes", "other_bytes")}
            kinds = {kind: {"runs": runs, "sent_bytes": sent} for kind, (runs, sent) in self.collectives.items()}
            content["traffic"] = {**moved, "collectives": kinds}
        return {**content, "device_days": self.device_days}

    def save(self, path: str | Path) -> None:
        """Writes the JSON object to a file."""
        write_atomically(path, json.dumps(self.to_json(), indent=2) + "\n")

    def table(self) -> str:
        """Returns the plan as text for people."""
        return "\n".join([*self._memory_lines(), *self._work_lines(), *self._time_lines()])

    def _memory_lines(self) -> list[str]:
        mesh = shown_mesh(self.mesh.values(), " ")
        what = "train step" if self.program == "train" else "sampling"
        memory = self.memory
        lines = [
            f"{self.stage}: {what}, batch {self.batch_size:,}, {self.topology} ({self.devices} devices), mesh {mesh}",
            "",
            "memory of a device",
        ]
        for name in ("parameters", "averages", "optimizer", "frozen", "batch", "temporaries"):
            lines.append(_line(name, shown_bytes(getattr(memory, name))))
        verdict = {True: "fits", False: "does not fit", None: "cannot tell"}[self.fits]
        limit = "" if memory.available is None else f" of {shown_bytes(memory.available)}"
        return [*lines, _line("peak", f"{shown_bytes(memory.peak)}{limit}: {verdict}")]

    def _work_lines(self) -> list[str]:
        recomputed = self.hardware_flops / self.model_flops - 1 if self.model_flops else 0.0
        lines = [
            "",
            "work of a step",
            _line("weights", f"{self.parameters:,}"),
            _line("FLOPs", f"{self.model_flops:.4g} (recomputation: {recomputed:+.0%})"),
        ]
        if self.traffic is None:
            return lines
        moved = self.traffic.matrix_bytes + self.traffic.other_bytes
        lines.append(
            _line(
                "bytes moved",
                f"{shown_bytes(moved)} by a device, {self.traffic.matrix_bytes / max(moved, 1):.0%} by products",
            )
        )
        for kind, (runs, sent) in sorted(self.collectives.items()):
            lines.append(_line(kind, f"{runs:,} runs, {shown_bytes(sent)} sent by a device"))
        return lines

    def _time_lines(self) -> list[str]:
        if self.time is None:
            return []
        time = self.time
        lines = [
            "",
            "time of a step, seconds: roofline of the datasheet",
            _line("compute", f"{time.compute:.4g}"),
            _line("memory", f"{time.memory:.4g}"),
            _line("network", f"{time.network:.4g}"),
            _line("step", f"{time.overlapped:.4g} if all of it overlaps, {time.serial:.4g} if nothing does"),
            _line("utilisation", f"{time.utilisation:.1%} to {time.serial_utilisation:.1%} of the peak"),
        ]
        if self.device_days is not None:
            low, high = self.device_days
            days = f"{low / self.devices:,.1f} to {high / self.devices:,.1f} days"
            lines.append(_line("whole run", f"{self.steps:,} steps: {low:,.0f} to {high:,.0f} device-days, {days}"))
        return lines


def _line(name: str, value: str) -> str:
    return f"  {name:20} {value}"


def shown_bytes(size: float | None) -> str:
    """Returns a size with its unit, such as "1.5 GiB"; "-" for None."""
    if size is None:
        return "-"
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:.0f} B"
