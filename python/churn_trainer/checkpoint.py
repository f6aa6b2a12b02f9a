"""A training's state on disk, whole or not there, and read without running code."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from churn_kernels._files import make_folder, refuse_link
from churn_kernels._printable import excerpt
from churn_trainer.stored import load_tensors, save_tensors

FORMAT = 2
"""Files of this format without a checksum are from before there were any."""

EARLIER = ".earlier"
"""What the name of the checkpoint before the last ends with."""


class Checkpoint:
    """The state of one training, saved now and then; the state saved before stays beside it.

    Args:
        path: its file.
        owner: ids of the runs it belongs to.
        seconds: time between two saves; 0 saves after every step. It changes no number.
        warn: called with a sentence where a damaged file is passed over.
        remedy: what to do where it cannot be used; None: delete it.
    """

    def __init__(
        self,
        path: Path,
        owner: list[str],
        seconds: float = 60.0,
        warn: Callable[[str], None] = lambda sentence: None,
        remedy: str | None = None,
    ):
        self.path, self.owner, self.seconds, self.warn = path, owner, seconds, warn
        self.earlier = path.with_name(path.name + EARLIER)
        self.remedy = remedy or f"delete {path} and {self.earlier.name} to train from the start"
        self._began = self._saved = time.monotonic()
        self._last_is_damaged = False

    @property
    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return self.path.exists() or self.earlier.exists()

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
        """Adds `state`, tensors and plain values, and forgets all but the one before.

        Raises: OSError (full disk), ValueError if a link takes the folder's place; what was saved
            stays.
        """
        make_folder(self.path.parent)
        content = {"format": FORMAT, "owner": self.owner, "state": state}
        save_tensors(self.path, content, None if self._last_is_damaged else self.earlier)
        self._saved, self._last_is_damaged = time.monotonic(), False

    def load(self, form: Any = Any) -> dict[str, Any] | None:
        """The state that was saved last, or None; where that file is damaged, the one before.

        Args:
            form: of the state, see `churn_kernels._files.check`; another is damage, too.
        Raises: ValueError if no file is whole, if they are of other runs, or if a symbolic link
            takes the place of their folder.
        """
        refuse_link(self.path.parent)
        damage: list[str] = []
        whole = {"format": {FORMAT}, "owner": [str], "state": form}
        for path in filter(Path.exists, (self.path, self.earlier)):
            try:
                content = load_tensors(path, self.remedy, whole)
            except ValueError as error:
                damage.append(str(error))
                continue
            if content["owner"] != self.owner:
                raise ValueError(
                    f"{path} must be a checkpoint of {', '.join(self.owner)}, got one of "
                    f"{excerpt(', '.join(content['owner']))}; delete it, or train into another "
                    "folder"
                )
            if damage:
                self._last_is_damaged = True
                reason = damage[0].removesuffix(f"; {self.remedy}")
                self.warn(f"{reason}; goes on from the checkpoint before it")
            return content["state"]
        if damage:
            raise ValueError(damage[0])
        return None

    def require(self) -> None:
        """Raises: ValueError if there is no state for a longer run to go on from."""
        if not self.exists:
            raise ValueError(
                f"{self.path} must hold the end of the run that go_on_from names, got no such "
                f"file; pass the --runs that it was trained with, or {self.remedy}"
            )

    def remove(self) -> None:
        """Deletes what a finished training has no use for, and the folder if it is empty."""
        self.path.unlink(missing_ok=True)
        self.earlier.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.parent.rmdir()
