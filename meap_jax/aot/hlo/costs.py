"""The costs of one run of a compiled program: the sum over its instructions, each as often as it runs."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from meap_jax.aot.hlo.flops import attention_flops, convolution_flops, kernel_name, product_flops
from meap_jax.aot.hlo.loops import trip_count
from meap_jax.aot.hlo.text import Computation, Instruction, Shape, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# They name, view or allocate memory; `while` and `call` are what they run.
_NO_TRAFFIC = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all partition-id replica-id "
    "opt-barrier iota copy-done async-done async-update domain".split()
)


@dataclasses.dataclass
class Costs:
    """Of one run of a program, on one device."""

    flops: int = 0  # Of matrix products, convolutions and attention kernels; nothing else.
    bytes: int = 0  # Read from and written to main memory.
    collectives: Counter = dataclasses.field(default_factory=Counter)  # By kind: how many run on a device.
    sent: Counter = dataclasses.field(default_factory=Counter)  # By kind: the bytes it sends for them (rings assumed).
    kernels: Counter = dataclasses.field(default_factory=Counter)  # Attention kernels by name: runs.
    unknown_kernels: Counter = dataclasses.field(default_factory=Counter)  # Kernels whose FLOPs no formula here gives.
    unknown_loops: Counter = dataclasses.field(
        default_factory=Counter
    )  # Length depends on data; their body counts once.

    def add(self, other: "Costs", times: int = 1) -> None:
        """Adds `times` runs of another program."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for name in ("collectives", "sent", "kernels", "unknown_kernels", "unknown_loops"):
            getattr(self, name).update({key: times * number for key, number in getattr(other, name).items()})


def analyze(text: str, num_devices: int = 1, hbm_spaces: Collection[int] = (0,)) -> Costs:
    """Counts what the entry computation of a compiled program does.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      num_devices: that run the program; the size of a collective's group where the text gives none.
      hbm_spaces: memory spaces whose traffic counts. On TPUs 0 alone, for 1 is on-chip memory; on GPUs 0 and 1.
    """
    computations, entry = parse(text)
    return _Counter(computations, num_devices, frozenset(hbm_spaces)).costs(entry)


class _Counter:
    def __init__(self, computations: Mapping[str, Computation], num_devices: int, hbm_spaces: frozenset[int]):
        self.computations = computations
        self.num_devices = num_devices
        self.hbm_spaces = hbm_spaces
        self.known: dict[tuple[str, bool], Costs] = {}

    def costs(self, name: str, fused: bool = False) -> Costs:
        """Of one run of a computation. What is fused has no memory traffic of its own."""
        if (name, fused) not in self.known:
            computation, total = self.computations[name], Costs()
            for instruction in computation.values():
                self.add(total, computation, instruction, fused)
            self.known[name, fused] = total
        return self.known[name, fused]

    def add(self, total: Costs, computation: Computation, i: Instruction, fused: bool) -> None:
        kind = i.opcode.removesuffix("-start")
        if i.opcode == "while":
            trips = trip_count(self.computations, computation, i)
            if trips is None:
                total.unknown_loops[i.name] += 1
            total.add(self.costs(i.called("body")), 1 if trips is None else trips)
        elif i.opcode == "conditional":
            branches = [self.costs(name) for name in i.branches()]
            total.add(max(branches, key=lambda branch: (branch.flops, branch.bytes)))
        elif i.opcode == "call" or kind == "async":
            total.add(self.costs(i.called("to_apply") or i.called("calls"), fused))
        elif i.opcode == "fusion":
            total.add(self.costs(i.called("calls"), fused=True))
        elif i.opcode == "dot":
            total.flops += product_flops(i, self.operands(computation, i))
        elif i.opcode == "convolution":
            total.flops += convolution_flops(i, self.operands(computation, i))
        elif kind in COLLECTIVES and not _continues(computation):
            self.add_collective(total, computation, i, kind)
        elif i.opcode == "custom-call":
            self.add_custom_call(total, computation, i)
        if not fused:
            total.bytes += self.traffic(computation, i)

    def add_custom_call(self, total: Costs, computation: Computation, i: Instruction) -> None:
        target, shapes = i.target(), self.operands(computation, i)
        if "gemm" in target or "matmul" in target:
            total.flops += product_flops(i, shapes)
        elif (flops := attention_flops(i, shapes)) is not None:
            total.flops += flops
            total.kernels[kernel_name(i)] += 1
        elif re.search(r"tpu_custom_call|triton|mosaic|cudnn", target):
            total.unknown_kernels[kernel_name(i)] += 1

    def operands(self, computation: Computation, i: Instruction) -> list[Shape]:
        """The arrays that an instruction reads; a tuple's one after the other."""
        return [shape for name in i.operands if name in computation for shape in computation[name].shapes]

    def add_collective(self, total: Costs, computation: Computation, i: Instruction, kind: str) -> None:
        n = group_size(i.attributes, self.num_devices)
        if n == 1:
            return  # Sends nothing: a permutation to oneself is a copy.
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # On TPUs an all-reduce fused with the slice that each device keeps.
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
        total.collectives[kind] += 1
        total.sent[kind] += round(share * sum(shape.bytes for shape in self.operands(computation, i)))

    # Memory traffic.

    def traffic(self, computation: Computation, i: Instruction) -> int:
        """Bytes that an instruction moves from and to main memory."""
        read, written = self.operands(computation, i), i.shapes
        if i.opcode in _NO_TRAFFIC or i.opcode == "async-start":
            return 0
        if i.opcode == "fusion":
            return self.fusion_traffic(computation, i)
        if i.opcode == "custom-call" and not (i.target().startswith("__") or "tpu_custom_call" in i.target()):
            return 0  # Allocations, layouts and the ends of asynchronous collectives.
        if i.opcode == "copy-start":
            return self.size(read[:1]) + self.size(i.shapes[1:2])
        if i.opcode in ("slice-start", "dynamic-slice-start"):
            return self.copied(i.shapes[len(read)], read[0])
        if i.opcode.endswith("-start"):
            return self.size(read)
        if i.opcode.endswith("-done"):
            return self.size(written)
        if i.opcode in ("slice", "dynamic-slice", "gather"):
            return self.copied(written[0], read[0])
        if i.opcode == "dynamic-update-slice":
            return 2 * self.size(read[1:2])
        return self.size(read) + self.size(written)

    def fusion_traffic(self, computation: Computation, i: Instruction) -> int:
        """A fusion reads of an operand that it only slices the slices, and writes of one that it updates the update."""
        inside = self.computations[i.called("calls")]
        read = sum(self.parameter_traffic(inside, p) for p in inside.values() if p.opcode == "parameter")
        root = inside.root
        results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return read + sum(self.result_traffic(inside, result) for result in results)

    def parameter_traffic(self, inside: Computation, parameter: Instruction) -> int:
        whole = self.size(parameter.shapes)
        if not whole:
            return 0
        total, space = 0, parameter.shapes[0].space
        for user in _users(inside, parameter):
            first = bool(user.operands) and _origin(inside, user.operands[0]) == parameter.name
            if user.opcode in ("slice", "dynamic-slice", "gather") and first:
                total += self.size([dataclasses.replace(user.shapes[0], space=space)])
            elif not (
                user.opcode == "tuple"  # Handed on as it is.
                or (user.opcode in COLLECTIVES and _continues(inside))
                or (user.opcode == "dynamic-update-slice" and first)  # Updated in place.
            ):
                return whole
        return min(total, whole)

    def result_traffic(self, inside: Computation, result: Instruction) -> int:
        origin = inside[_origin(inside, result.name)]
        if origin.opcode == "parameter" or (origin.opcode in COLLECTIVES and _continues(inside)):
            return 0
        if origin.opcode == "dynamic-update-slice":
            update = inside[origin.operands[1]].shapes[0]
            return self.size([dataclasses.replace(update, space=result.shapes[0].space)])
        return self.size(result.shapes)

    def copied(self, moved: Shape, whole: Shape) -> int:
        """Bytes of a slice that is read from the memory of the whole array and written to its own."""
        return self.size([moved, dataclasses.replace(moved, space=whole.space)])

    def size(self, shapes: Collection[Shape]) -> int:
        return sum(shape.bytes for shape in shapes if shape.space in self.hbm_spaces)


def _continues(computation: Computation) -> bool:
    """Whether this is a later step of a TPU's asynchronous collective, which repeats the instruction of the first."""
    ends = any(i.opcode == "custom-call" and i.target() == "AsyncCollectiveDone" for i in computation.values())
    return ends or computation.name.startswith("async_collective_fusion")


def _users(computation: Computation, instruction: Instruction) -> Iterator[Instruction]:
    """The instructions that read it, through bitcasts."""
    for user in computation.values():
        if instruction.name in user.operands:
            if user.opcode == "bitcast":
                yield from _users(computation, user)
            else:
                yield user


def _origin(computation: Computation, name: str) -> str:
    """The instruction whose value a bitcast views."""
    while computation[name].opcode == "bitcast":
        name = computation[name].operands[0]
    return name


def group_size(attributes: str, num_devices: int) -> int:
    """The number of devices in a group of a collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):  # {{0,1},{2,3}}
        return len(match.group(1).split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):  # [groups,size]<=[devices]
        return int(match.group(2))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):  # mesh['a'=2,'b'=4] {'b'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        pairs = re.findall(r"(\d+),(\d+)", match.group(1))
        return len(pairs) if any(sender != receiver for sender, receiver in pairs) else 1
    return num_devices
