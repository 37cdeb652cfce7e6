"""The collectives of a compiled program: how many there are, over which mesh axes, and how many bytes they send.

The body of a loop counts as often as it runs, and fusions and calls are followed. A collective with separate start and
done instructions counts once.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from nextllm_jax.plan.hlo import Computation, Instruction, Program, parse, sizes

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One kind of collective over one set of mesh axes in one type."""

    kind: str
    axes: str
    """Mesh axes joined by "+"; "slices" between slices of TPUs; "other" for groups that match no mesh axes."""
    dtype: str


class Traffic(NamedTuple):
    """The total of one kind of collective in one run of a program."""

    count: float
    sent_bytes: float
    """Bytes that each device sends with ring algorithms: S (n - 1) / n to gather or scatter S bytes over n devices,
    twice that for an all-reduce, S for a permute."""


class Collectives(NamedTuple):
    """The collectives in one run of a program on one device."""

    traffic: dict[Collective, Traffic]
    unknown_loops: int
    """Loops with collectives whose trip count is unknown; they count as one iteration."""


def collectives(hlo: str, mesh_shape: Mapping[str, int], slices: int = 1) -> Collectives:
    """The collectives in the text of a program, on a mesh whose devices are numbered as in `mesh.devices.flat`.

    With several TPU slices, which split the axis "data", the program numbers the devices within a slice.
    """
    program = parse(hlo)
    inside = {name: size // slices if name == "data" else size for name, size in mesh_shape.items()}
    walk = _Walk(program, _Axes(inside), slices)
    totals = walk.totals(program.entry)
    return Collectives({key: totals[key] for key in sorted(totals)}, walk.unknown_loops)


_Totals = dict[Collective, Traffic]


def _add(totals: _Totals, key: Collective, more: Traffic, times: float = 1) -> None:
    old = totals.get(key, Traffic(0, 0))
    totals[key] = Traffic(old.count + times * more.count, old.sent_bytes + times * more.sent_bytes)


class _Walk:
    """Sums the collectives of computations, visiting each computation once."""

    def __init__(self, program: Program, axes: "_Axes", slices: int) -> None:
        self._program = program
        self._axes = axes
        self._slices = slices
        self._totals: dict[str, _Totals] = {}
        self._started = {
            self._chain(instruction)
            for computation in program.computations.values()
            for instruction in computation.instructions.values()
            if _starts(instruction)
        }
        self.unknown_loops = 0

    def totals(self, name: str) -> _Totals:
        """The collectives of one run of a computation."""
        if name not in self._totals:
            self._totals[name] = self._sum(self._program.computations[name])
        return self._totals[name]

    def _sum(self, computation: Computation) -> _Totals:
        totals: _Totals = {}
        steps_seen: set[str] = set()
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            between = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
            if kind in KINDS:
                self._add_collective(totals, kind, self._axes.of(instruction), instruction, computation)
            elif between and instruction.opcode == "send":
                kind = between.lower().replace("_", "-")
                self._add_collective(totals, kind, (self._slices, "slices"), instruction, computation)
            elif instruction.callees and not instruction.opcode.endswith(("-done", "-update")):
                chain = self._chain(instruction)
                again = chain in steps_seen or (chain in self._started and not _starts(instruction))
                if chain is None or not again:
                    self._add_callees(totals, instruction, computation)
                steps_seen |= {chain} if chain else set()
        return totals

    def _add_collective(
        self,
        totals: _Totals,
        kind: str,
        group: tuple[int, str],
        instruction: Instruction,
        computation: Computation,
    ) -> None:
        """Add one collective, by the types of its operands. `group` is (devices in a group, their mesh axes)."""
        members, axes = group
        if members == 1:
            return
        share = {
            "all-gather": members - 1,
            "all-reduce": 2 * (members - 1) / members,
            "collective-permute": 1.0,
        }.get(kind, (members - 1) / members)
        given: Counter[str] = Counter()
        for operand in instruction.operands:
            given += sizes(computation.instructions[operand].shapes)
        for dtype, size in given.items():
            _add(totals, Collective(kind, axes, dtype), Traffic(1, size * share))

    def _add_callees(self, totals: _Totals, caller: Instruction, computation: Computation) -> None:
        """Add the collectives of the computations that an instruction calls, multiplied by the number of calls."""
        parts = [self.totals(callee) for callee in caller.callees if callee in self._program.computations]
        parts = [part for part in parts if part]
        if not parts:
            return
        if caller.opcode == "conditional":
            parts = [max(parts, key=lambda part: sum(traffic.sent_bytes for traffic in part.values()))]
        times = self._trip_count(caller, computation) if caller.opcode == "while" else 1
        for part in parts:
            for key, traffic in part.items():
                if _scatters(caller):
                    key, traffic = key._replace(kind="reduce-scatter"), Traffic(traffic.count, traffic.sent_bytes / 2)
                _add(totals, key, traffic, times)

    def _trip_count(self, loop: Instruction, computation: Computation) -> int:
        times = self._program.trip_count(computation, loop)
        if times is None:
            self.unknown_loops += 1
        return 1 if times is None else times

    def _chain(self, caller: Instruction) -> str | None:
        """The id of the asynchronous collective that a fusion is a step of; None for other instructions.

        TPU programs fuse the steps of an asynchronous collective with computations that run at the same time, also in
        loops. Each of these fusions contains the whole collective, which must count once.
        """
        if caller.opcode != "fusion":
            return None
        for callee in caller.callees:
            for instruction in self._program.computations[callee].instructions.values():
                if instruction.opcode in KINDS and (chain := instruction.attribute(r'chain_id="(\w+)"')):
                    return chain
        return None


def _starts(instruction: Instruction) -> bool:
    """Whether a fusion is the first step of a TPU's asynchronous collective."""
    return instruction.opcode == "fusion" and instruction.name.startswith("async-collective-start")


def _scatters(caller: Instruction) -> bool:
    """Whether a fusion is a TPU's reduce-scatter, which is written as an all-reduce followed by a slice."""
    return caller.opcode == "fusion" and any(callee.startswith("all-reduce-scatter") for callee in caller.callees)


class _Axes:
    """Finds the mesh axes that the device groups of a collective span."""

    def __init__(self, mesh_shape: Mapping[str, int]) -> None:
        shape = tuple(mesh_shape.values())
        ids = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        self._all = ids.reshape(1, -1)
        axes = [(position, name) for position, (name, size) in enumerate(mesh_shape.items()) if size > 1]
        self._known: dict[str, np.ndarray] = {}
        """Device numbers [groups, members] by axes joined by "+", small groups first."""
        for count in range(1, len(axes) + 1):
            for chosen in itertools.combinations(axes, count):
                last = np.moveaxis(ids, [position for position, _ in chosen], range(-count, 0))
                members = np.prod(last.shape[-count:])
                self._known["+".join(name for _, name in chosen)] = _ordered(last.reshape(-1, members))

    def of(self, instruction: Instruction) -> tuple[int, str]:
        """(devices in a group, their mesh axes joined by "+"); (1, ...) if no data moves between devices."""
        if pairs := instruction.attribute(r"source_target_pairs=\{(\{.*?\})\}"):
            return self._of_pairs(np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs)]))
        groups = _ordered(self._groups(instruction))
        same = (name for name, known in self._known.items() if np.array_equal(known, groups))
        return groups.shape[1], next(same, "other")

    def _of_pairs(self, pairs: np.ndarray) -> tuple[int, str]:
        """The same for a permute: the smallest set of axes along which all its data moves."""
        if np.array_equal(pairs[:, 0], pairs[:, 1]):
            return 1, ""
        for name, groups in self._known.items():
            group_of = np.zeros(self._all.size, int)
            group_of[groups.ravel()] = np.repeat(np.arange(len(groups)), groups.shape[1])
            if np.all(group_of[pairs[:, 0]] == group_of[pairs[:, 1]]):
                return groups.shape[1], name
        return self._all.size, "other"

    def _groups(self, instruction: Instruction) -> np.ndarray:
        """Device numbers [groups, members], from any of the notations that XLA prints."""
        if mesh := re.search(
            r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", instruction.attributes
        ):
            return _mesh_groups(mesh[1], mesh[2], mesh[3])
        if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", instruction.attributes):
            return _iota(iota[2]).reshape(_numbers(iota[1]))
        listed = instruction.attribute(r"replica_groups=\{(\{.*?\})\}")
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed)]) if listed else self._all


def _ordered(groups: np.ndarray) -> np.ndarray:
    """The same groups in canonical order."""
    groups = np.sort(groups, axis=1)
    return groups[np.argsort(groups[:, 0])]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(text: str) -> np.ndarray:
    """Device numbers of "[4,2]T(1,0)": an iota of that shape, transposed and flattened."""
    shape, _, order = text.strip("[)").partition("]")
    ids = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order.lstrip("T("))) if order else ids).ravel()


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> np.ndarray:
    """Groups along axes of XLA's own mesh, such as mesh "'a'=2,'b'=8" and axes "'b':(2)4", a part of an axis."""
    sizes_by_name = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(np.prod(list(sizes_by_name.values()), dtype=int))
    if device_ids:
        ids = _iota(device_ids) if device_ids.startswith("[") else np.array(_numbers(device_ids))
    shape: list[int] = []
    chosen: list[int] = []
    wanted = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, size in sizes_by_name.items():
        before, part = wanted.get(name, ("", ""))
        split = [int(before), int(part), size // (int(before) * int(part))] if part else [1, size, 1]
        chosen += [len(shape) + 1] if name in wanted else []
        shape += split
    moved = np.moveaxis(ids.reshape(shape), chosen, range(-len(chosen), 0))
    return moved.reshape(-1, np.prod([shape[position] for position in chosen], dtype=int))
