"""The operator that first computes something else from the same inputs.

A step is replayed, and every operator that PyTorch dispatches is logged with hashes of what went in
and what came out, forward, backward and in the optimizer. Of two logs the first operator whose
inputs agree and whose outputs differ is the cause; what differs after it, it made so.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from churn_kernels.hashing import tensor_hash
from churn_kernels.intervals import rule_of_three

AroundReplay = Callable[[int], AbstractContextManager[Any]]
"""The block that a replay of a number from 0 runs in."""

_LIBRARIES = ("torch.", "churn_kernels.audit.operators", "churn_kernels._", "contextlib")
# Devices are left out: what is computed on two can be compared.
_PLAIN = (int, float, complex, str, torch.dtype, torch.layout, type(None))
# What these return was not written yet.
_UNWRITTEN = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::empty_permuted",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
}


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Attributes:
        name: as PyTorch dispatches it, such as "aten.mm.default".
        inputs, outputs: hashes of its tensors, and its numbers and flags as text; the state of a
            random number generator it draws from is an input, a tensor it writes to an output.
        tensors: dtypes and shapes, as text.
        module: path of the module whose forward pass called it, or whose backward pass it is.
        phase: "forward" or "backward"; what no module has called is neither: "".
        source: file and line outside of the libraries that called it, or of the forward call that
            it is the backward of.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: str
    module: str
    phase: str
    source: str


@dataclass
class _Origin:
    """Where an operator of the forward pass was called from."""

    module: str
    source: str


class OperatorLog(TorchDispatchMode):
    """A block whose operators are logged.

    Attributes:
        operations: in the order of execution.
        kept: outputs of the operation of index `keep`, copied.
    """

    def __init__(self, model: nn.Module, keep: int = -1) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.kept: list[Tensor] = []
        self._keep = keep
        self._names = {module: name or "(model)" for name, module in model.named_modules()}
        self._path: list[str] = []
        self._origins: dict[int, _Origin] = {}  # by the sequence number of the autograd node
        self._stack = ExitStack()

    def __enter__(self) -> "OperatorLog":
        for module, name in self._names.items():
            for hook in (
                module.register_forward_pre_hook(lambda *_, name=name: self._path.append(name)),
                module.register_forward_hook(
                    lambda *_: self._path.pop() and None, always_call=True
                ),
            ):
                self._stack.callback(hook.remove)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _only_looks(func):
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)]
        inputs = [tensor_hash(x) for x in given]
        inputs.append(repr([x for x in leaves if isinstance(x, _PLAIN)]))
        if torch.Tag.nondeterministic_seeded in func.tags:
            inputs.append(tensor_hash(_generator_state(given, kwargs)))
        result = func(*args, **kwargs)
        outputs = written_tensors(func, args, kwargs, result)
        if len(self.operations) == self._keep:
            self.kept = [x.detach().clone() for x in outputs]
        module, phase, source = self._where()
        self.operations.append(
            Operation(
                str(func),
                tuple(inputs),
                tuple(tensor_hash(x) for x in outputs),
                f"({_described(given)}) -> ({_described(outputs)})",
                module,
                phase,
                source,
            )
        )
        return result

    def _where(self) -> tuple[str, str, str]:
        node = torch._C._current_autograd_node()
        if node is not None:
            origin = self._origins.get(node._sequence_nr(), _Origin("", ""))
            source = f"backward of {origin.source}" if origin.source else f"in {node.name()}"
            return origin.module, "backward", source
        source = _caller(sys._getframe(2))
        module = self._path[-1] if self._path else ""
        # Autograd made the node of this call just before, if it made one.
        number = torch._C._autograd._get_sequence_nr() - 1
        self._origins.setdefault(number, _Origin(module, source))
        return module, "forward" if self._path else "", source


def _only_looks(func: Any) -> bool:
    """Whether an operator returns its input seen another way, and computes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def written_tensors(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> list[Tensor]:
    """What a call of an operator returned, and which of its arguments it has written to."""
    if func._schema.name in _UNWRITTEN:
        return []
    found = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [
                x
                for x in tree_leaves(value)
                if isinstance(x, Tensor) and all(x is not y for y in found)
            ]
    return found


def _generator_state(given: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    generator = kwargs.get("generator")
    if generator is not None:
        state: Tensor = generator.get_state()
        return state
    device = next((x.device for x in given), torch.device(kwargs.get("device") or "cpu"))
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _described(tensors: list[Tensor]) -> str:
    return ", ".join(f"{str(x.dtype)[6:]}{list(x.shape)}" for x in tensors)


def _caller(frame: FrameType | None) -> str:
    """File and line of the innermost frame outside of the libraries."""
    while frame is not None:
        if not str(frame.f_globals.get("__name__", "")).startswith(_LIBRARIES):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@dataclass(frozen=True)
class Differences:
    """How two tensors differ.

    Attributes:
        share: of the elements that differ, in (0, 1].
        positions: indices of the first of them.
        ulps: of floating-point tensors, how many elements differ by 1, by 2 or 3, by 4 to 7, ..
            units in the last place, by the lower bound; of others, empty.
        largest_ulps: the largest such difference; 0 where there is none.
        largest: the largest absolute difference.
    """

    share: float
    positions: list[tuple[int, ...]]
    ulps: dict[int, int] = field(default_factory=dict)
    largest_ulps: int = 0
    largest: float = 0.0


def differences(a: Tensor, b: Tensor, positions: int = 8) -> Differences | None:
    """How two tensors of one dtype and shape differ; None if all their bits are the same."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    a, b = (x.detach().cpu().contiguous() for x in (a, b))
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    bits = [x.view(kinds[x.element_size()]).to(torch.int64) for x in (a, b)]
    differ = bits[0] != bits[1]
    if not differ.any():
        return None
    where = [tuple(place) for place in differ.nonzero()[:positions].tolist()]
    share = differ.double().mean().item()
    if not a.is_floating_point():
        return Differences(share, where)
    top = 1 << (8 * a.element_size() - 1)
    # Floats in order: those of negative sign count down from -1.
    ranks = [torch.where(x < 0, -(x & (top - 1)), x) for x in bits]
    finite = a.isfinite() & b.isfinite() & differ
    apart = (ranks[0] - ranks[1]).abs()[finite]
    apart = apart[apart > 0]
    ulps: dict[int, int] = {}
    for bucket in range(63):
        within = int((apart >> bucket == 1).sum())
        if within:
            ulps[1 << bucket] = within
    largest = (a.double() - b.double()).abs()[finite]
    return Differences(
        share,
        where,
        ulps,
        int(apart.max()) if len(apart) else 0,
        largest.max().item() if len(largest) else 0.0,
    )


@dataclass(frozen=True)
class Finding:
    """What replays of a step showed.

    Attributes:
        verdict: "operator": `operation` made different outputs of the same inputs. "input": it was
            given different inputs that no operator made: data, or memory written from outside.
            "sequence": the replays called different operators. "none": all replays were the same.
        index: of the operation in the step, from 0; -1 with "none".
        log: all operations of the first replay.
        other_log: those of the replay that differs; with "none", of the last one.
        outputs: how its outputs differ, one for each; empty where they could not be caught twice.
        replays: how often the step was run until two differed.
    """

    verdict: str
    index: int
    log: list[Operation]
    other_log: list[Operation]
    outputs: list[Differences | None]
    replays: int

    @property
    def operation(self) -> Operation | None:
        """The operation, as the first replay has it; None with "none", or where it has ended."""
        return self.log[self.index] if 0 <= self.index < len(self.log) else None

    @property
    def other(self) -> Operation | None:
        """The same call in the replay that differs."""
        return self.other_log[self.index] if 0 <= self.index < len(self.other_log) else None

    @property
    def bound(self) -> float:
        """With "none": below it is the share of steps that differ, at 95 % (rule of three)."""
        return rule_of_three(self.replays - 1)


def find_operator(
    step: Callable[[], Any],
    model: nn.Module,
    restore: Callable[[], Any],
    *,
    replays: int = 5,
    around: AroundReplay = nullcontext,
) -> Finding:
    """Replay a step until two replays differ, and name the first operator that makes them.

    Args:
        step: one training step: forward, backward, optimizer, or a part of that.
        model: whose modules are named.
        restore: brings everything that the step starts from back to one state, random states
            included; called before each replay. `snapshot` makes such a function.
        replays: how often to run the step, at least 2; more only to catch the outputs that differ.
        around: the block that a replay runs in, by the replay's number from 0: to compare settings,
            let it alternate between them, as `stress` does.
    Returns: a `Finding`. Every operator's tensors are hashed, so a step takes many times as long.
    Raises: ValueError for fewer than two replays.
    """

    def run(replay: int, keep: int) -> OperatorLog:
        restore()
        with around(replay), OperatorLog(model, keep) as log:
            step()
        return log

    return first_difference(run, replays)


def first_difference(run: Callable[[int, int], OperatorLog], replays: int) -> Finding:
    """The first difference between replays of any kind, on one device or on two.

    Args:
        run: logs the replay of a number from 0, keeping the outputs of the operation of an index,
            which may be -1 for none.
        replays: as of `find_operator`.
    Raises: ValueError for fewer than two replays.
    """
    if replays < 2:
        raise ValueError(
            f"replays must be at least 2, got {replays}; one has nothing to differ from"
        )
    first = again = run(0, -1).operations
    for replay in range(1, replays):
        again = run(replay, -1).operations
        found = _where_logs_part(first, again)
        if found is None:
            continue
        verdict, index = found
        outputs = _catch(run, index, replay, replays) if verdict == "operator" else []
        return Finding(verdict, index, first, again, outputs, replay + 1)
    return Finding("none", -1, first, again, [], replays)


def _where_logs_part(a: list[Operation], b: list[Operation]) -> tuple[str, int] | None:
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if (one.name, one.tensors) != (other.name, other.tensors):
            return "sequence", index
        if one.inputs != other.inputs:
            return "input", index
        if one.outputs != other.outputs:
            return "operator", index
    return None if len(a) == len(b) else ("sequence", min(len(a), len(b)))


def _catch(
    run: Callable[[int, int], OperatorLog], index: int, differed: int, replays: int
) -> list[Differences | None]:
    """The operation's outputs in two more replays that differ, side by side."""
    kept = run(0, index).kept
    for replay in range(differed, differed + max(replays, 10)):
        again = run(replay, index).kept
        if len(kept) == len(again):
            found = [differences(a, b) for a, b in zip(kept, again, strict=True)]
            if any(found):
                return found
    return []
