"""Where a training step's time goes: the kernels of a trace, by kind.

The profiler says when each kernel ran and, mostly, which instruction of the compiled program it belongs to; the program
says which operation of the model an instruction comes from. In a captured graph of launches the instruction is not said.
The kernels of fusions are then known by their names, which are those of their instructions, and the vendors' products and
attention by theirs.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jax.profiler import ProfileData

KINDS = (
    "products", "attention", "feedforward", "norms and sums", "embedding and loss", "optimizer", "copies", "other",
)  # fmt: skip
"""Products are all but attention's own; feedforward is what it does besides products; copies change place or type only."""

_FUSED_ATTENTION = re.compile(r"fmha|flash|sdpa|attention", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|matmul|dot_general|(^|_)dot(_|\.|$)", re.IGNORECASE)
_BY_NAME = {
    "norms and sums": re.compile(r"norm", re.IGNORECASE),
    "feedforward": re.compile(r"tree|gelu|gate|glu", re.IGNORECASE),
    "embedding and loss": re.compile(r"loss|embed", re.IGNORECASE),
}
"""Kernels of ours whose instruction is not known."""
_COPY = re.compile(r"mem(cpy|set)", re.IGNORECASE)
_MOVES = {
    "bitcast", "bitcast-convert", "broadcast", "concatenate", "constant", "convert", "copy", "copy-done", "copy-start",
    "dynamic-slice", "dynamic-update-slice", "get-tuple-element", "pad", "parameter", "reshape", "slice", "transpose", "tuple",
}  # fmt: skip
"""Opcodes that compute nothing."""


class Kernel(NamedTuple):
    """A kernel that ran."""

    name: str
    instruction: str
    """The instruction of the program that it belongs to, or "" if the trace does not say."""
    seconds: float
    """Without those of kernels that ran inside it, as the body of a loop does on a CPU."""


class Instruction(NamedTuple):
    """An instruction of a compiled program."""

    operation: str
    """The path of the operation that it comes from, such as `jit(train_step)/jvp(Encoder)/layer_00/attention/exp`, or ""."""
    moves: bool
    """It computes nothing, nor do the instructions fused in it."""


def read_trace(trace: bytes) -> list[Kernel]:
    """Return the kernels of a serialised trace: those of the accelerators if it has any, else the CPU's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the type that holds an event's facts
        planes = list(ProfileData.from_serialized_xspace(trace).planes)
        cards = [plane for plane in planes if re.match("/device:(GPU|TPU)", plane.name)]
        lines = [line for plane in cards or planes for line in plane.lines]
        if cards:  # other lines show the same time again, by module or by step
            streams = [line for line in lines if line.name.startswith("Stream")]
            lines = streams or [line for line in lines if line.name == "XLA Ops"]
        return [kernel for line in lines for kernel in _kernels(line.events, bool(cards))]


def _kernels(events: Iterable[Any], card: bool) -> list[Kernel]:
    """Return the kernels of a line, each with the time that no kernel inside it has."""
    own: list[tuple[str, str, float]] = []
    running: list[tuple[float, int]] = []  # ends of the kernels around this one, and their places in `own`
    for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        instruction = str(next((value for name, value in event.stats if name == "hlo_op"), ""))
        if not (instruction or card):
            continue
        while running and running[-1][0] <= event.start_ns:
            running.pop()
        if running:
            name, around, nanoseconds = own[running[-1][1]]
            own[running[-1][1]] = name, around, nanoseconds - event.duration_ns
        running.append((event.start_ns + event.duration_ns, len(own)))
        own.append((event.name, instruction, float(event.duration_ns)))
    return [Kernel(name, instruction, max(0.0, nanoseconds) / 1e9) for name, instruction, nanoseconds in own]


def read_program(text: str) -> dict[str, Instruction]:
    """Return the instructions of a compiled program's text (HLO) by name, and again by the names that kernels get."""
    operations: dict[str, str] = {}
    opcodes: dict[str, str] = {}
    called: dict[str, str] = {}
    inside: defaultdict[str, list[str]] = defaultdict(list)
    computation = ""
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = start[1]
        if not (assigned := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)", line)):
            continue
        name, rest = assigned[1], assigned[2]
        if opcode := re.search(r"(?:^|\s)([a-z][\w-]*)\(", rest):
            opcodes[name] = opcode[1]
        inside[computation].append(name)
        if operation := re.search(r'op_name="((?:[^"\\]|\\.)*)"', rest):
            operations[name] = operation[1]
        if opcodes.get(name) == "fusion" and (body := re.search(r"calls=%?([\w.-]+)", rest)):
            called[name] = body[1]
    program: dict[str, Instruction] = {}
    for name, opcode in opcodes.items():
        body = inside[called[name]] if name in called else []
        fused = [operations[other] for other in body if other in operations]
        moves = all(opcodes.get(other) in _MOVES for other in body) if body else opcode in _MOVES
        program[name] = Instruction(operations.get(name) or (fused[-1] if fused else ""), moves)
    return {re.sub(r"\W", "_", name): instruction for name, instruction in program.items()} | program


def kind_of(kernel: Kernel, instruction: Instruction | None) -> str:
    """Return the kind, one of KINDS, of a kernel that belongs to an instruction, if that is known."""
    names, operation = f"{kernel.name} {kernel.instruction}", instruction.operation if instruction else ""
    if _FUSED_ATTENTION.search(names):
        return "attention"
    if _COPY.search(kernel.name):
        return "copies"
    if _PRODUCT.search(kernel.name) or _PRODUCT.search(kernel.instruction) or operation.endswith("dot_general"):
        # Attention's own products are einsums of two batched operands, such as bhqk,bhsk->bhqs.
        return "attention" if re.search(r"/attention/[^/]*,[^/]*/", operation) else "products"
    if instruction is None:
        return next((kind for kind, name in _BY_NAME.items() if name.search(kernel.name)), "other")
    if operation and "jvp(" not in operation:
        return "optimizer"
    if instruction.moves:
        return "copies"
    if "/attention" in operation:
        return "attention"
    if re.search(r"/layer_\d+/(\w+_norm\b|[^/]*$)|/final_norm", operation):
        return "norms and sums"
    if re.search(r"/layer_\d+/", operation):
        return "feedforward"
    return "embedding and loss" if operation else "other"


def profile_report(kernels: Sequence[Kernel], program: str, steps: int) -> dict[str, Any]:
    """Report the kernels of so many steps, in seconds a step.

    `seconds` is the sum of all, `kinds` has it by kind, and `largest` has the kernels that take most, those of all layers
    together: `name`, `operation`, `kind`, `seconds`, and `times` a step.
    """
    instructions = read_program(program)
    seconds: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    times: Counter[tuple[str, str, str]] = Counter()
    for kernel in kernels:
        instruction = instructions.get(kernel.instruction) or instructions.get(kernel.name)
        operation = re.sub(r"layer_\d+", "layer", instruction.operation if instruction else "")
        at = (re.sub(r"[._]\d+$", "", kernel.name), operation, kind_of(kernel, instruction))
        seconds[at] += kernel.seconds / steps
        times[at] += 1
    kinds = dict.fromkeys(KINDS, 0.0)
    for (_, _, kind), taken in seconds.items():
        kinds[kind] += taken
    largest = [
        {"name": at[0], "operation": at[1], "kind": at[2], "seconds": taken, "times": times[at] / steps}
        for at, taken in sorted(seconds.items(), key=lambda item: -item[1])[:40]
    ]
    return {"seconds": sum(kinds.values()), "kinds": kinds, "largest": largest}
