"""Saving tensors made under `torch.inference_mode()` for the backward pass.

Autograd refuses to save them because it cannot detect in-place changes to them; here the caller is
responsible for not changing them.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def saveable(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, with each inference tensor replaced by a normal alias of its memory."""
    return [_alias(x) if x is not None and x.is_inference() else x for x in tensors]


def _alias(x: Tensor) -> Tensor:
    with torch._C._DisableFuncTorch():  # x is a tensor that transforms have wrapped
        memory = x.untyped_storage()
        alias = torch.empty(0, dtype=x.dtype, device=x.device)
        return alias.set_(memory, x.storage_offset(), x.size(), x.stride())


def saveable_in_graph(
    logits: Sequence[Tensor], target: Tensor | None, class_weight: Tensor | None
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """As `saveable`, traceable by torch.compile; copies, because an op may not return its input."""
    inputs = [_saveable_in_graph(x) for x in (*logits, target, class_weight)]
    return inputs[:-2], inputs[-2], inputs[-1]


def _saveable_in_graph(x: Any) -> Any:
    if x is None or x.requires_grad:
        return x
    from torch._dynamo.comptime import comptime

    comptime(_record_inference_x)
    return torch.ops.churn_kernels.copy(x) if _made_in_inference_mode() else x


_seen: list[bool] = []


def _record_inference_x(context: Any) -> None:
    """At compile time: record whether x, a local of the traced function, is an inference tensor.

    Inside the graph x does not tell; the graph arguments that it was computed from do.
    """
    nodes = [context.get_local("x").as_proxy().node]
    seen = set(nodes)
    for node in nodes:  # grows by each node's inputs
        new = [source for source in node.all_input_nodes if source not in seen]
        nodes += new
        seen.update(new)
    tensors = [
        argument.example if argument is not None else node.meta.get("example_value")
        for node in nodes
        for argument in [node.meta.get("grapharg")]
    ]
    _seen.append(any(isinstance(t, Tensor) and t.is_inference() for t in tensors))


def _made_in_inference_mode() -> bool:
    if not _seen.pop():
        return False
    _define_copy()
    return True


# The compiler calls this and treats the result as a constant; see `_backend._gpu_problem`.
_made_in_inference_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _define_copy() -> Any:
    """Define a copy op that the compiler does not optimise away."""
    library = torch.library.Library("churn_kernels", "FRAGMENT")
    library.define("copy(Tensor x) -> Tensor")
    library.impl("copy", torch.clone, "CompositeExplicitAutograd")
    torch.library.register_fake("churn_kernels::copy", torch.empty_like, lib=library)
    return library  # the op exists as long as its library
