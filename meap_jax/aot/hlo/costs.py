"""What a compiled program does in one run: the sum over its instructions, each as often as it runs."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator

from meap_jax.aot.hlo.flops import attention_flops, convolution_flops, kernel_name, product_flops
from meap_jax.aot.hlo.loops import trip_count
from meap_jax.aot.hlo.text import Computation, Instruction, Module, Shape, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# They name, view or allocate memory; `while` and `call` are what they run.
_NO_TRAFFIC = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all partition-id replica-id "
    "opt-barrier iota copy-done async-done async-update domain".split()
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many a device takes part in, and the bytes it sends for them (rings assumed)."""

    count: int = 0
    bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes)


@dataclasses.dataclass
class Costs:
    """Of one run of a program, on one device."""

    flops: int = 0  # Of matrix products, convolutions and attention kernels; nothing else.
    bytes: int = 0  # Read from and written to main memory.
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    kernels: Counter = dataclasses.field(default_factory=Counter)  # Attention kernels by name: runs.
    unknown_kernels: Counter = dataclasses.field(default_factory=Counter)  # Kernels whose FLOPs no formula here gives.
    unknown_loops: frozenset[str] = frozenset()  # Loops whose length depends on data; they count once.

    def add(self, other: "Costs", times: int = 1) -> None:
        """Adds `times` runs of another program."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, traffic in other.collectives.items():
            more = Traffic(times * traffic.count, times * traffic.bytes)
            self.collectives[kind] = self.collectives.get(kind, Traffic()) + more
        for own, others in ((self.kernels, other.kernels), (self.unknown_kernels, other.unknown_kernels)):
            own.update({name: times * runs for name, runs in others.items()})
        self.unknown_loops |= other.unknown_loops


def analyze(text: str, num_devices: int = 1, hbm_spaces: Collection[int] = (0,)) -> Costs:
    """Counts what the entry computation of a compiled program does.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      num_devices: that run the program; the size of a collective's group where the text gives none.
      hbm_spaces: memory spaces whose traffic counts. On TPUs 0 alone, for 1 is on-chip memory; on GPUs 0 and 1.
    """
    module = parse(text)
    return _Counter(module, num_devices, frozenset(hbm_spaces)).costs(module.entry)


class _Counter:
    def __init__(self, module: Module, num_devices: int, hbm_spaces: frozenset[int]):
        self.computations = module.computations
        self.num_devices = num_devices
        self.hbm_spaces = hbm_spaces
        self.known: dict[tuple[str, bool], Costs] = {}

    def costs(self, name: str, fused: bool = False) -> Costs:
        """Of one run of a computation. What is fused has no memory traffic of its own."""
        if (name, fused) not in self.known:
            computation, total = self.computations[name], Costs()
            for instruction in computation:
                self.add(total, computation, instruction, fused)
            self.known[name, fused] = total
        return self.known[name, fused]

    def add(self, total: Costs, computation: Computation, i: Instruction, fused: bool) -> None:
        kind = i.opcode.removesuffix("-start")
        if i.opcode == "while":
            trips = trip_count(self.computations, computation, i)
            if trips is None:
                total.unknown_loops |= {i.name}
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
            total.add(self.collective(computation, i, kind))
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

    # Collectives.

    def collective(self, computation: Computation, i: Instruction, kind: str) -> Costs:
        n = group_size(i.attributes, self.num_devices)
        read = sum(shape.bytes for shape in self.operands(computation, i))
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # On TPUs an all-reduce fused with the slice that each device keeps.
        sent = {
            "all-gather": read * (n - 1),
            "reduce-scatter": read * (n - 1) / n,
            "all-reduce": 2 * read * (n - 1) / n,
            "all-to-all": read * (n - 1) / n,
            "ragged-all-to-all": read * (n - 1) / n,
            "collective-permute": read,
        }[kind]
        # Groups of one device send nothing, and permutations to oneself are copies.
        return Costs(collectives={kind: Traffic(1, round(sent))} if n > 1 else {})

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
            moved = i.shapes[len(read)]
            return self.size([moved]) + self.size([dataclasses.replace(moved, space=read[0].space)])
        if i.opcode.endswith("-start"):
            return self.size(read)
        if i.opcode.endswith("-done"):
            return self.size(written)
        if i.opcode in ("slice", "dynamic-slice", "gather"):
            return self.size(written) + self.size([dataclasses.replace(written[0], space=read[0].space)])
        if i.opcode == "dynamic-update-slice":
            return 2 * self.size(read[1:2])
        return self.size(read) + self.size(written)

    def fusion_traffic(self, computation: Computation, i: Instruction) -> int:
        """A fusion reads of an operand that it only slices the slices, and writes of one that it updates the update."""
        inside = self.computations[i.called("calls")]
        read = sum(self.parameter_traffic(inside, p) for p in inside if p.opcode == "parameter")
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
            elif user.opcode == "tuple" or (user.opcode in COLLECTIVES and _continues(inside)):
                pass  # Handed on as it is.
            elif user.opcode == "dynamic-update-slice" and first:
                pass  # Updated in place.
            else:
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

    def size(self, shapes: Collection[Shape]) -> int:
        return sum(shape.bytes for shape in shapes if shape.space in self.hbm_spaces)


def _continues(computation: Computation) -> bool:
    """Whether this is a later piece of a TPU's asynchronous collective, which repeats the first one's instruction."""
    ends = any(i.opcode == "custom-call" and i.target() == "AsyncCollectiveDone" for i in computation)
    return ends or computation.name.startswith("async_collective_fusion")


def _users(computation: Computation, instruction: Instruction) -> Iterator[Instruction]:
    """Who reads it, through bitcasts."""
    for user in computation:
        if instruction.name in user.operands:
            if user.opcode == "bitcast":
                yield from _users(computation, user)
            else:
                yield user


def _origin(computation: Computation, name: str) -> str:
    """What a bitcast views."""
    while computation[name].opcode == "bitcast":
        name = computation[name].operands[0]
    return name


def group_size(attributes: str, num_devices: int) -> int:
    """Devices that take part in a collective together."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):  # {{0,1},{2,3}}
        return len(match.group(1).split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):  # [groups,size]<=[devices]
        return int(match.group(2))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):  # mesh['a'=2,'b'=4] {'b'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        pairs = re.findall(r"(\d+),(\d+)", match.group(1))
        return len(pairs) if any(source != target for source, target in pairs) else 1
    return num_devices
