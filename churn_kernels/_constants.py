"""Constants that Python shares with csrc/rows."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

CONSTANTS: Any = (
    import_module("churn_kernels._C").constants if find_spec("churn_kernels._C") else None
)
"""None if the library was not built."""


@cache
def hash_keys(device: torch.device) -> Tensor:
    """(2, 1024) int64: the key of each position in a block of a hash."""
    return torch.tensor(CONSTANTS.hash_keys, device=device)
