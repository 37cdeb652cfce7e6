"""Parses the text of an optimized XLA program into computations and instructions, and finds trip counts of loops."""

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "tf32": 32, "token": 0}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^}(,|$)")  # a line of a kernel's backend config may begin with "}}"
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLEES = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shapes: str
    """Type of the result: a shape, or a tuple of them."""
    opcode: str
    arguments: str
    """The text between the parentheses."""
    attributes: str
    """The text after the parentheses."""

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it uses."""
        return _NAME.findall(self.arguments)

    @property
    def callees(self) -> list[str]:
        """Names of the computations that it calls, except the condition of a loop."""
        return [name for found in _CALLEES.findall(self.attributes) for name in _NAME.findall(found)]

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program. `root` names the instruction that it returns, which may not be the last one."""

    instructions: dict[str, Instruction]
    root: str | None

    def integer(self, name: str) -> int | None:
        """The value of an instruction that is an integer constant or a copy of one."""
        instruction = self.instructions.get(name)
        while instruction and instruction.opcode in ("copy", "convert", "bitcast", "copy-done", "copy-start"):
            instruction = self.instructions.get(instruction.operands[0])
        if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.arguments):
            return None
        return int(instruction.arguments)


@dataclasses.dataclass(frozen=True)
class Program:
    """The program of one device."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, caller: Computation, loop: Instruction) -> int | None:
        """How often the body of a while loop runs; None if unknown.

        CPU programs contain the trip count. Otherwise it is found if the condition compares a counter with a constant
        and the body adds a constant to the counter.
        """
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations.get(loop.attribute(r"condition=%([\w.\-]+)") or "")
        body = self.computations.get(loop.attribute(r"body=%([\w.\-]+)") or "")
        compare = condition.instructions.get(condition.root or "") if condition else None
        if not condition or not body or not compare or "direction=LT" not in compare.attributes:
            return None
        counter = condition.instructions.get(compare.operands[0])
        end = condition.integer(compare.operands[1])
        index = counter.attribute(r"index=(\d+)") if counter and counter.opcode == "get-tuple-element" else None
        if index is None or end is None:
            return None
        step = _step(body, int(index))
        start = _initial(caller, loop, int(index))
        return None if not step or start is None else max(0, -(-(end - start) // step))


def _step(body: Computation, index: int) -> int | None:
    """The constant that a loop's body adds to element `index` of its state; None if there is none."""
    root = body.instructions.get(body.root or "")
    if root is None or root.opcode != "tuple":
        return None
    update = body.instructions.get(root.operands[index])
    if update is None or update.opcode != "add":
        return None
    steps = [body.integer(operand) for operand in update.operands]
    return next((step for step in steps if step is not None), None)


def _initial(caller: Computation, loop: Instruction, index: int) -> int | None:
    state = caller.instructions.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    return caller.integer(state.operands[index])


def parse(hlo: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current, root = "", "", None
    instructions: dict[str, Instruction] = {}
    for line in hlo.splitlines():
        if current and _END.match(line):
            computations[current] = Computation(instructions, root)
            current = ""
        elif header := _COMPUTATION.match(line):
            current, instructions, root = header[1], {}, None
            entry = current if line.startswith("ENTRY") else entry
        elif current and (found := _INSTRUCTION.match(line)):
            instructions[found[1]] = _instruction(found[1], line[found.end() :])
            root = found[1] if line.lstrip().startswith("ROOT") else root
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """The instruction in `text`, which follows "%name = "."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes, rest = text[:end], text[end:].lstrip()
    opcode = rest.partition("(")[0]
    close = _closing(rest, len(opcode))
    return Instruction(name, shapes, opcode, rest[len(opcode) + 1 : close], rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    return len(text)


def sizes(shapes: str) -> Counter[str]:
    """Bytes by dtype in a shape or a tuple of shapes, without the padding of tiles."""
    result: Counter[str] = Counter()
    for dtype, dims in _SHAPE.findall(shapes):
        width = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(width[0]) if width else 0)
        result[dtype] += math.prod(int(dim.lstrip("<=")) for dim in dims.split(",") if dim) * bits // 8
    return result
