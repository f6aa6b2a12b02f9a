"""A training's state on disk, whole or not there, and read without running code."""

from __future__ import annotations

import io
import pickle
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from churn_kernels._files import write_atomically

FORMAT = 2


class Checkpoint:
    """The state of one training, saved now and then.

    Args:
        path: its file.
        owner: ids of the runs it belongs to.
        seconds: time between two saves; 0 saves after every step. It changes no number.
    """

    def __init__(self, path: Path, owner: list[str], seconds: float = 60.0):
        self.path, self.owner, self.seconds = path, owner, seconds
        self._began = self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= self.seconds

    def steps_left(self, done: int) -> int:
        """0 if it is time to save; else the steps that half of the time until then has room for.

        Args:
            done: steps, at least 1, since this was made: what a step takes.
        """
        if self.due():
            return 0
        now = time.monotonic()
        left = self._saved + self.seconds - now
        return max(1, int(left / 2 * done / (now - self._began)))

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the file by `state`, tensors and plain values. Raises: OSError (full disk)."""
        save_tensors(self.path, {"format": FORMAT, "owner": self.owner, "state": state})
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, or None.

        Raises: ValueError if the file is no checkpoint, of another format, or of other runs.
        """
        if not self.path.exists():
            return None
        content = load_tensors(self.path, f"delete {self.path} to train from the start")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f"{self.path} must be a checkpoint of format {FORMAT}, got something else; delete "
                "it to train from the start"
            )
        if content["owner"] != self.owner:
            raise ValueError(
                f"{self.path} must be a checkpoint of {', '.join(self.owner)}, got one of "
                f"{', '.join(content['owner'])}; delete it, or train into another folder"
            )
        return content["state"]

    def remove(self) -> None:
        """Deletes the file, which a finished training has no use for, and its folder if empty."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.parent.rmdir()


def save_tensors(path: Path, content: Any) -> None:
    """Tensors and plain values as a file of torch's, written atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_tensors(path: Path, remedy: str) -> Any:
    """What `save_tensors` wrote, on the CPU. Classes and functions in the file are refused.

    Raises: ValueError with `remedy` if the file is anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} must hold tensors and plain values, got: {reason}; {remedy}"
        ) from None
