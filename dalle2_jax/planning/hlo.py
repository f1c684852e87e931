"""What a compiled program does: bytes of memory traffic and collectives, from its optimised HLO.

Instructions of loops count as often as the loops run: as XLA notes it (``known_trip_count``), or as the loop's
condition compares its counter with a constant, as in every ``scan``. Loops of unknown length count once.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_ITEM_BITS = {
    **{"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64},
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
    **{"f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8},
}

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?<=\s)([a-z][a-z0-9\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

_WORKSPACE = re.compile(r"\b[su]8\[\d+\]")
"""Memory for intermediate results, among the results of a call of a library."""

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "iota", "opt-barrier", "add-dependency"),
}
"""Opcodes without traffic of their own."""

_MATRIX_CALLS = re.compile(r"conv|gemm|matmul|dot|fmha|attention|tpu_custom_call", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode, bytes of its result, names of its operands, and the rest of its line."""

    name: str
    opcode: str
    bytes: int
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs once."""
        return tuple(_CALLED.findall(self.rest))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of `KINDS`.
      bytes: of its operands on one device.
      group: positions of the devices of one group.
      runs: how often a step runs it.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    runs: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all runs, on a ring."""
        n = len(self.group)
        factor = {"all-gather": n - 1.0, "all-reduce": 2.0 * (n - 1) / n, "collective-permute": 1.0}
        return self.runs * self.bytes * factor.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one step does on one device.

    Attributes:
      matrix_bytes: read and written by matrix products and convolutions, with what is fused into them.
      other_bytes: read and written by everything else.
      collectives: the collective operations.
    """

    matrix_bytes: float
    other_bytes: float
    collectives: tuple[Collective, ...]


def read_traffic(text: str, devices: int) -> Traffic:
    """Returns the traffic of an optimised program.

    Args:
      text: its HLO, as ``compiled.as_text()`` returns it.
      devices: that run it.
    """
    module = Module(text, devices)
    matrix, other, collectives = 0.0, 0.0, Counter()
    for instruction, computation, runs in module.walk(module.entry, 1):
        kind = module.collective_kind(instruction)
        if kind is not None:
            size = sum(module.size(computation, name) for name in instruction.operands)
            collectives[kind, size, module.group(instruction)] += runs
        traffic = runs * module.traffic(computation, instruction)
        if module.is_matrix(instruction):
            matrix += traffic
        else:
            other += traffic
    found = (Collective(kind, size, group, runs) for (kind, size, group), runs in collectives.items())
    return Traffic(matrix, other, tuple(each for each in found if len(each.group) > 1))


def shape_bytes(text: str) -> int:
    """Returns the bytes of a type as HLO writes it, such as "(bf16[2,8]{1,0}, f32[])"; layouts are ignored."""
    total = 0
    for item, axes in _SHAPE.findall(text):
        if item in _ITEM_BITS:
            total += math.prod(map(int, filter(None, axes.split(",")))) * _ITEM_BITS[item] // 8
    return total


class Module:
    """A parsed program.

    Attributes:
      devices: that run it.
      computations: name -> its instructions by name.
      entry: name of the computation that is run.
    """

    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if current is None:
                started = _COMPUTATION.match(line)
                if started:
                    current = self.computations[started[1]] = {}
                    self.entry = started[1] if line.startswith("ENTRY") else self.entry
            elif line.startswith("}"):
                current = None
            elif (found := _INSTRUCTION.match(line)) and (parsed := _parse(found[1], found[2], "ROOT " in line[:12])):
                current[parsed.name] = parsed
        self._cost = functools.cache(self._fusion_cost)
        self._has_product = functools.cache(self._contains_product)

    def opcodes(self, instruction: Instruction) -> set[str]:
        """Returns the opcode of an instruction, or of a fusion those that are fused."""
        if instruction.opcode != "fusion":
            return {instruction.opcode}
        return {each.opcode for name in instruction.called for each in self.computations.get(name, {}).values()}

    def walk(self, name: str, runs: int) -> Iterator[tuple[Instruction, str, int]]:
        """Yields every instruction of a computation and of those that it runs, and how often each runs."""
        for instruction in self.computations.get(name, {}).values():
            yield instruction, name, runs
            if instruction.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
                if body:
                    yield from self.walk(body[1], runs * self.trips(instruction))
            elif instruction.opcode == "conditional":
                for names in _BRANCHES.findall(instruction.rest):
                    branches = [each.strip().lstrip("%") for part in names for each in part.split(",") if each]
                    yield from self.walk(max(branches, key=lambda each: len(self.computations.get(each, ()))), runs)
            elif instruction.opcode in ("call", "async-start"):
                for called in instruction.called:
                    yield from self.walk(called, runs)
            elif instruction.opcode == "fusion":
                for called in instruction.called:
                    for inner in self.computations.get(called, {}).values():
                        if self.collective_kind(inner):
                            yield inner, called, runs

    def trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs; 1 if that is unknown."""
        noted = _TRIPS.search(loop.rest)
        if noted:
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        inside = self.computations.get(condition[1], {}) if condition else {}
        for each in inside.values():
            if each.root and each.opcode == "compare" and "direction=LT" in each.rest:
                bounds = [inside[name] for name in each.operands if name in inside]
                found = [int(bound.rest) for bound in bounds if bound.opcode == "constant" and bound.rest.isdecimal()]
                return found[0] if found else 1
        return 1

    def size(self, computation: str, name: str) -> int:
        """Returns the bytes of an instruction's result."""
        found = self.computations[computation].get(name)
        return 0 if found is None else found.bytes

    def collective_kind(self, instruction: Instruction) -> str | None:
        """Returns the kind of a collective, at its start if it is asynchronous; None for other instructions."""
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            return None
        return "reduce-scatter" if "reduce-scatter" in instruction.name else kind

    def is_matrix(self, instruction: Instruction) -> bool:
        """Whether an instruction is, or has fused into it, a matrix product or a convolution."""
        if instruction.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
            return bool(target and _MATRIX_CALLS.search(target[1]))
        if instruction.opcode == "fusion":
            return any(self._has_product(name) for name in instruction.called)
        return instruction.opcode in ("dot", "convolution")

    def _contains_product(self, name: str) -> bool:
        return any(self.is_matrix(each) for each in self.computations.get(name, {}).values())

    def traffic(self, computation: str, instruction: Instruction) -> int:
        """Returns the bytes that an instruction reads and writes in one run."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or opcode == "async-start" or self.collective_kind(instruction):
            return 0
        operands = [self.size(computation, name) for name in instruction.operands]
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * instruction.bytes
        if opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if opcode == "fusion" and instruction.called:
            reads, written = self._cost(instruction.called[0])
            sizes = (min(read, size) for read, size in zip(reads, operands, strict=False))
            return sum(sizes) + min(written, instruction.bytes)
        return sum(operands) + instruction.bytes

    def _fusion_cost(self, name: str) -> tuple[tuple[int, ...], int]:
        """Returns the bytes that a fused computation reads of each parameter, and those that it writes.

        Of a parameter of which only slices are used, such as the stacked weights of a loop, only they are read; of a
        result that updates a slice in place, only the slice is written.
        """
        inside = self.computations.get(name, {})
        users: dict[str, list[Instruction]] = {each: [] for each in inside}
        for instruction in inside.values():
            for operand in instruction.operands:
                if operand in users:
                    users[operand].append(instruction)
        parameters = [each for each in inside.values() if each.opcode == "parameter"]
        numbers = {int(each.rest.partition(")")[0]): each for each in parameters}
        reads = (min(_read(inside, users, each.name), each.bytes) for _, each in sorted(numbers.items()))
        return tuple(reads), sum(_written(inside, each) for each in inside.values() if each.root)

    def group(self, instruction: Instruction) -> tuple[int, ...]:
        """Returns the positions of the devices of one group of a collective."""
        return read_group(instruction.rest, self.devices)


def _read(inside: dict[str, Instruction], users: dict[str, list[Instruction]], name: str) -> int:
    """Returns the bytes that the users of an instruction read of its result."""
    total = 0
    for user in users[name]:
        first = user.operands[0] == name
        if user.opcode == "bitcast":
            total += _read(inside, users, user.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += user.bytes
        elif not (user.opcode == "dynamic-update-slice" and first):
            total += inside[name].bytes
    return total


def _written(inside: dict[str, Instruction], root: Instruction) -> int:
    """Returns the bytes that are written for a root."""
    operands = [inside[name] for name in root.operands if name in inside]
    if root.opcode == "dynamic-update-slice":
        return operands[1].bytes
    if root.opcode in ("tuple", "bitcast"):
        return sum(_written(inside, each) for each in operands)
    return root.bytes


def _parse(name: str, text: str, root: bool) -> Instruction | None:
    """Returns the instruction of a line: TYPE OPCODE(OPERANDS), ATTRIBUTES."""
    opcode = _OPCODE.search(text)
    if opcode is None:
        return None
    depth, end = 1, opcode.end()
    while depth and end < len(text):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    inside = text[opcode.end() : end - 1]
    rest = {"parameter": text[opcode.end() :], "constant": inside}.get(opcode[1], text[end:])
    operands = tuple(_OPERAND.findall(inside)) if opcode[1] not in ("parameter", "constant") else ()
    result = text[: opcode.start()]
    if opcode[1] == "custom-call" and result.startswith("("):
        result = _WORKSPACE.sub("", result)
    return Instruction(name, opcode[1], shape_bytes(result), operands, rest, root)


def read_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Returns the positions of the devices of a collective's first group, in each form in which HLO writes groups."""
    pairs = re.search(r"source_target_pairs=\{(\{\d+,\d+\}(?:,\{\d+,\d+\})*)\}", attributes)
    if pairs:
        both = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
        return next((pair for pair in both if pair[0] != pair[1]), (0,))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        dims = [int(size) for size in iota[3].split(",")]
        places = np.arange(math.prod(dims)).reshape(dims)
        places = places.transpose([int(axis) for axis in iota[4].split(",")]) if iota[4] else places
        return tuple(places.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if named:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        used = set(re.findall(r"'([^']+)'", named[2]))
        places = np.arange(math.prod(axes.values())).reshape([*axes.values()])
        return tuple(places[tuple(slice(None) if name in used else 0 for name in axes)].ravel().tolist())
    return tuple(range(devices))
