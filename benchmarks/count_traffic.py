"""Counts what code moves through memory, operation by operation, without a card: bytes, launches, peak.

    with Traffic() as traffic:
        loss = model(inputs)                 # on the meta device at the real widths: no weights, no arithmetic, seconds
        traffic.mark("forward")
        loss.backward()
        traffic.mark("backward")
    print(traffic.table())

What it counts, for every operation that reaches torch's dispatcher while it is entered, forward and backward alike:
- bytes: each operand read once from memory, each result written once. In-place operations read what they change;
  `copy_`, `zero_`, random fills and the like only write it. An expanded operand counts once; lookups read the rows that
  they take, not their table. Views and `empty` cost nothing;
- launches: one kernel an operation. Sorting and some reductions take several, so a card launches a little more;
- floating-point operations of products, by torch's own table (torch.utils.flop_counter);
- live bytes of what was made inside, and their peak: what autograd saved is what is live after `forward`.

Kinds: `product` (what that table knows, and 4-bit products), `unpack` (4-bit weights to 16 bits), `elementwise` (all
else). A fused kernel is an operator of its own (torch.library.custom_op with register_fake); it counts as one launch
that reads its operands and writes its results. Where that is wrong, `costs` takes another rule for it:

    @costs("brightrun::grouped_nf4")
    def _(arguments, result): return [Cost("product", read=…, written=…, flops=…)]

`python benchmarks/count_traffic.py` counts a small example whose bytes can be checked by hand.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

KINDS = ("product", "unpack", "elementwise")

# The rates that turn bytes into seconds, an H100's: memory as elementwise kernels reach it, bf16 products.
H100_BYTES_A_SECOND = 2.5e12
H100_FLOPS = 550e12


@dataclass(frozen=True)
class Cost:
    """One kernel: what kind, bytes read and written, floating-point operations."""

    kind: str
    read: int
    written: int
    flops: int = 0


Rule = Callable[[dict[str, Any], Any], "list[Cost]"]
_RULES: dict[str, Rule] = {}

_MADE_WITHOUT_A_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "set_"}
_ONLY_WRITE = {"zero_", "fill_", "copy_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_", "arange"}
# They read as much of their first operand as they return.
_LOOKUPS = {"index", "index_select", "embedding", "gather", "_unsafe_index", "index_put_", "index_put", "scatter_"}
_UNPACKING = {"dequantize_4bit", "dequantize_blockwise"}


def costs(operator: str) -> Callable[[Rule], Rule]:
    """Registers what an operator (`namespace::name`) costs. The rule gets its arguments by name, and its result."""

    def register(rule: Rule) -> Rule:
        _RULES[operator] = rule
        return rule

    return register


class Traffic(TorchDispatchMode):
    """A mode that lets operations run and adds up what they cost, in phases that `mark` ends."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, list[Cost]] = {}
        self.operations: Counter[str] = Counter()
        self.bytes_by_operation: Counter[str] = Counter()
        self.live_bytes = self.peak_bytes = 0
        self.live_after: dict[str, int] = {}
        self.peak_of: dict[str, int] = {}
        self._pending: list[Cost] = []
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        found = _costs_of(func, args, kwargs, result)
        self._pending += found
        if found:
            self.operations[func._schema.name] += len(found)
            self.bytes_by_operation[func._schema.name] += sum(cost.read + cost.written for cost in found)
        for tensor in _tensors(result):
            self._follow(tensor)
        return result

    def mark(self, phase: str) -> None:
        """Ends a phase: what was counted since the last mark is its part. A repeated name adds up."""
        self.phases.setdefault(phase, []).extend(self._pending)
        self.live_after[phase] = self.live_bytes
        self.peak_of[phase] = self.peak_bytes
        self._pending = []
        self.peak_bytes = self.live_bytes

    def costs(self, phase: str | None = None) -> list[Cost]:
        """Returns one phase's kernels, or all of them."""
        if phase is not None:
            return self.phases.get(phase, [])
        return [cost for part in (*self.phases.values(), self._pending) for cost in part]

    def bytes(self, kind: str | None = None, phase: str | None = None) -> int:
        return sum(cost.read + cost.written for cost in self.costs(phase) if kind in (None, cost.kind))

    def launches(self, kind: str | None = None, phase: str | None = None) -> int:
        return sum(kind in (None, cost.kind) for cost in self.costs(phase))

    def flops(self, phase: str | None = None) -> int:
        return sum(cost.flops for cost in self.costs(phase))

    def table(self) -> str:
        """A line for each phase and kind, and the largest movers of memory below."""
        lines = [f"{'phase':<12} {'kind':<12} {'launches':>9} {'GB moved':>10} {'TFLOP':>8}"]
        for phase in self.phases:
            for kind in KINDS:
                part = [cost for cost in self.phases[phase] if cost.kind == kind]
                moved, flops = sum(cost.read + cost.written for cost in part), sum(cost.flops for cost in part)
                if part:
                    lines.append(f"{phase:<12} {kind:<12} {len(part):>9} {moved / 1e9:>10.3f} {flops / 1e12:>8.3f}")
            lines.append(
                f"{phase:<12} live after: {self.live_after[phase] / 2**20:.1f} MiB, peak "
                f"{self.peak_of[phase] / 2**20:.1f} MiB"
            )
        lines += [
            f"{name:<40} {self.operations[name]:>7} × {moved / 1e9:>9.3f} GB"
            for name, moved in self.bytes_by_operation.most_common(12)
        ]
        return "\n".join(lines)

    def _follow(self, tensor: torch.Tensor) -> None:
        """Counts a storage that is new to us until it is freed."""
        storage = tensor.untyped_storage()
        # A storage keeps its Python object for as long as any tensor uses it.
        identity, size = id(storage), storage.nbytes()
        if identity in self._storages:
            return
        self._storages.add(identity)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, identity, size)

    def _forget(self, identity: int, size: int) -> None:
        self._storages.discard(identity)
        self.live_bytes -= size

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves these out of the live bytes: weights and inputs that were made before."""
        for tensor in tensors:
            self._storages.add(id(tensor.untyped_storage()))


def _costs_of(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> list[Cost]:
    name = func._schema.name
    short = name.partition("::")[2]
    if name in _RULES:
        names = [argument.name for argument in func._schema.arguments]
        defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
        return _RULES[name]({**defaults, **dict(zip(names, args, strict=False)), **kwargs}, result)
    if func.is_view or short in _MADE_WITHOUT_A_KERNEL:
        return []
    written_names = {
        argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write
    }
    changed: list[torch.Tensor] = []
    operands: list[torch.Tensor] = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        (changed if argument.name in written_names else operands).extend(_tensors(value))
    for key, value in kwargs.items():
        (changed if key in written_names else operands).extend(_tensors(value))
    identities = {id(tensor) for tensor in changed}
    storages = {tensor.untyped_storage()._cdata for tensor in (*operands, *changed)}
    results = [tensor for tensor in _tensors(result) if id(tensor) not in identities]
    if not changed and results and all(tensor.untyped_storage()._cdata in storages for tensor in results):
        # A reshape or a conversion that had nothing to do.
        return []
    written = sum(map(_bytes, (*results, *changed)))
    read = sum(map(_bytes, operands)) + (0 if short in _ONLY_WRITE else sum(map(_bytes, changed)))
    if short in _LOOKUPS:
        taken = [tensor for tensor in _tensors((args, kwargs)) if tensor is not args[0]]
        read = written + sum(map(_bytes, taken))
        if short in ("index_put_", "index_put", "scatter_"):
            read = written = sum(map(_bytes, taken))
    formula = flop_registry.get(getattr(torch.ops.aten, short.removesuffix("_"), func._overloadpacket))
    if formula is not None:
        if kwargs.get("beta") == 0:
            # What was there before is overwritten unread.
            read -= sum(map(_bytes, changed))
        return [Cost("product", read, written, int(formula(*args, out_val=result)))]
    return [Cost("unpack" if short in _UNPACKING else "elementwise", read, written)]


@costs("bitsandbytes::gemm_4bit")
def _(arguments: dict[str, Any], result: torch.Tensor) -> list[Cost]:
    """With many rows bitsandbytes unpacks the whole weight and multiplies (backends/cuda/ops.py)."""
    rows, packed = arguments["A"], arguments["B"]
    count = math.prod(arguments["shapeB"])
    weight = count * rows.element_size()
    found = []
    scales = 4 * (count // arguments["blocksize"])
    if arguments["absmax_8bit"] is not None:
        # The scales themselves are in 8 bits: unpacked, then shifted by their mean.
        found = [Cost("unpack", _bytes(arguments["absmax_8bit"]), scales), Cost("unpack", scales, scales)]
    found.append(Cost("unpack", _bytes(packed) + scales, weight))
    flops = 2 * (rows.numel() // rows.shape[-1]) * count
    return [*found, Cost("product", _bytes(rows) + weight, _bytes(result), flops)]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    """The memory that a tensor's elements lie in: an expanded axis is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return int(count * tensor.element_size())


def main() -> None:
    rows = torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(4096, 2048, dtype=torch.bfloat16, device="meta")
    with Traffic() as traffic:
        traffic.ignore([rows, weight])
        total = torch.nn.functional.silu(rows @ weight.t()).sum()
        traffic.mark("forward")
        total.backward()
        traffic.mark("backward")
    print(traffic.table())


if __name__ == "__main__":
    main()
