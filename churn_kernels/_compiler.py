"""What torch.compile has to be told."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def tells_the_compiler(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose errors reach the user from under torch.compile(fullgraph=True), too.

    There an exception becomes a break of the graph, whose text does not say what was raised first.
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
