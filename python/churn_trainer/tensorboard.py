"""A run's curves as TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from churn_kernels._files import make_folder

FOLDER = "tensorboard"


class TensorBoard:
    """Writes one run's curves below its folder.

    Args:
        folder: the run's.
    Raises: ValueError if TensorBoard is not installed, or a link takes its folder's place.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard must be installed to write its event files, got no such package; "
                "pip install tensorboard, or leave --tensorboard out"
            ) from None
        make_folder(folder / FOLDER)
        self._make = lambda epoch: SummaryWriter(str(folder / FOLDER), purge_step=epoch)
        self._writer: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        """The numbers of one epoch; what a killed process wrote of it or later is dropped."""
        if self._writer is None:
            self._writer = self._make(row["epoch"])
        for name, value in row.items():
            if name != "epoch" and value != "":
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()
