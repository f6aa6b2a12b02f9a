"""The operators of a step, each with hashes of what went in and what came out.

All that PyTorch dispatches is logged, forward, backward and in the optimizer. Memory that nothing
has written is no input: it is filled with one byte, whatever was there.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from churn_kernels.audit.hashes import data_hash
from churn_kernels.audit.state import Named, contents
from churn_kernels.hashing import tensor_hash

_LIBRARIES = (
    "torch.",
    "churn_kernels.audit.log",
    "churn_kernels.audit.operators",
    "churn_kernels._",
    "contextlib",
)
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
# What these are given to write to they overwrite whole, as every operator does with `out`.
_OVERWRITING = {
    "aten::_foreach_copy_",
    "aten::_foreach_zero_",
    "aten::bernoulli_",
    "aten::cauchy_",
    "aten::copy_",
    "aten::exponential_",
    "aten::fill_",
    "aten::geometric_",
    "aten::log_normal_",
    "aten::normal_",
    "aten::random_",
    "aten::uniform_",
    "aten::zero_",
}
# Of these one output is for their backward pass alone, which does not read all of it; the rest was
# never written.
_WORKSPACE = {
    "aten::_batch_norm_with_update": 3,
    "aten::_ctc_loss": 1,
    "aten::_cudnn_rnn": 4,
    "aten::_efficient_attention_forward": 1,
    "aten::_scaled_dot_product_efficient_attention": 1,
    "aten::cudnn_batch_norm": 3,
    "aten::miopen_rnn": 4,
    "aten::mkldnn_rnn_layer": 3,
}


@dataclass(frozen=True)
class Operation:
    """One call of an operator.

    Attributes:
        name: as PyTorch dispatches it, such as "aten.mm.default".
        inputs, outputs: hashes of its tensors, and its numbers and flags as text; the state of a
            random number generator it draws from is an input, a tensor it writes to an output.
            What it overwrites whole is no input, and a workspace neither.
        tensors: dtypes and shapes, as text.
        module: path of the module whose forward pass called it, or whose backward pass it is.
        phase: "forward" or "backward"; what no module has called is neither: "".
        source: file and line outside of the libraries that called it, or of the forward call that
            it is the backward of.
        in_place: whether it returns nothing but tensors that it was given to write to.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: str
    module: str
    phase: str
    source: str
    in_place: bool = False


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
        left: after the block, a hash of the models' parameters, buffers and gradients.

    Args:
        model: whose modules are named.
        keep: an index of an operation; -1 for none.
        fill: the byte that memory is filled with which nothing has written.
        state: other models by name, among other things: their modules are named after it.
    """

    def __init__(
        self, model: nn.Module, keep: int = -1, fill: int = 0, state: Named | None = None
    ) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.kept: list[Tensor] = []
        self.left = ""
        self._models = {"": model}
        self._models |= {n: m for n, m in (state or {}).items() if isinstance(m, nn.Module)}
        self._keep = keep
        self._fill = fill
        self._workspaces: dict[int, StorageWeakRef] = {}  # which keeps an address from others
        self._names = {
            module: f"{of}.{name}".strip(".") or "(model)"
            for of, one in reversed(self._models.items())
            for name, module in one.named_modules()
        }
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
        if exception[0] is not None:
            return
        self.left = data_hash(
            [
                [contents(model), [p.grad for p in model.parameters()]]
                for model in self._models.values()
            ]
        )()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _only_looks(func):
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        given = [x for x in leaves if isinstance(x, Tensor)]
        inputs = [self._hash_of_input(x) for x in _read_tensors(func, args, kwargs, given)]
        inputs.append(repr([x for x in leaves if isinstance(x, _PLAIN)]))
        if torch.Tag.nondeterministic_seeded in func.tags:
            inputs.append(tensor_hash(_generator_state(given, kwargs)))
        result = call_filling(func, args, kwargs, self._fill)
        outputs = written_tensors(func, args, kwargs, result)
        if func._schema.name in _WORKSPACE:
            workspace = result[_WORKSPACE[func._schema.name]]
            if isinstance(workspace, Tensor):
                storage = workspace.untyped_storage()
                self._workspaces[storage._cdata] = StorageWeakRef(storage)
                outputs = [x for x in outputs if x is not workspace]
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
                all(any(x is y for y in given) for x in outputs),
            )
        )
        return result

    def _hash_of_input(self, x: Tensor) -> str:
        plain = x.layout == torch.strided and not is_traceable_wrapper_subclass(x)
        if plain and x.untyped_storage()._cdata in self._workspaces:
            return "workspace"
        return tensor_hash(x)

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


def _read_tensors(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
) -> list[Tensor]:
    """The tensors given to an operator, without those that it overwrites whole."""
    overwrites = func._schema.name in _OVERWRITING
    left = list(given)
    for argument, value in _written_arguments(func, args, kwargs):
        if overwrites or argument.is_out:
            for x in tree_leaves(value):
                place = next((i for i, y in enumerate(left) if y is x), None)
                if place is not None:
                    del left[place]
    return left


def _written_arguments(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[Any, Any]]:
    """The arguments that an operator writes to, each with its value."""
    return [
        (argument, args[i] if i < len(args) else kwargs.get(argument.name))
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


class FilledMemory(TorchDispatchMode):
    """A block in which memory that nothing has written holds zeros."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return call_filling(func, args, kwargs or {}, 0)


def call_filling(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], byte: int) -> Any:
    """Call an operator; if it returns memory that nothing has written, that holds a byte."""
    name = func._schema.name
    if name not in _UNWRITTEN or name == "aten::set_":
        return func(*args, **kwargs)
    kept = _bytes_of(args[0]) if name == "aten::resize_" else 0
    result = func(*args, **kwargs)
    _fill(result, byte, kept)
    return result


def _bytes_of(x: Tensor) -> int:
    return 0 if is_traceable_wrapper_subclass(x) else x.untyped_storage().nbytes()


def _fill(x: Any, byte: int, begin: int) -> None:
    """Write a byte all over memory that nothing has written, from an offset on."""
    if not isinstance(x, Tensor) or x.is_meta or x.layout != torch.strided:
        return
    if is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            _fill(getattr(x, name), byte, begin)
        return
    memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    memory[begin:].fill_(byte)


def written_tensors(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> list[Tensor]:
    """What a call of an operator returned, and which of its arguments it has written to."""
    if func._schema.name in _UNWRITTEN:
        return []
    found = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    for _, value in _written_arguments(func, args, kwargs):
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
