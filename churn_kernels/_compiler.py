"""Error reporting under torch.compile."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def with_compile_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Make the function's errors reach the user under torch.compile(fullgraph=True).

    There an exception becomes a graph break, whose text does not include the original message.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, NotImplementedError) as error:
            torch._dynamo.graph_break(msg=str(error))
            raise

    return call
