"""What every data set is to the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """N labelled rows, fetched by their numbers.

    Attributes:
        title: what a reader calls it.
        labels: (N,) int64 in [0, classes).
        classes: C.
        shape: of one input; (channels, height, width) of an image.
        fetch: rows (B,) int64 -> inputs (B, *shape), uint8 or float32.
        is_image: whether inputs can be cropped and mirrored.
        per_pixel: standardise every number of the input by itself, or each channel as a whole.
        test_start: rows from this one on are the data set's own test rows; 0: it has none.
        in_memory: whether fetching is a copy; else minibatches are fetched one ahead.
        default_rows: training rows where nothing is said and there are no test rows; 0: 4/5 of all.
        content: digest of labels and inputs; None where they follow from the settings.
    """

    title: str
    labels: Tensor
    classes: int
    shape: tuple[int, ...]
    fetch: Callable[[Tensor], Tensor]
    is_image: bool
    per_pixel: bool = False
    test_start: int = 0
    default_rows: int = 0
    in_memory: bool = True
    content: str | None = None

    def __post_init__(self) -> None:
        if not self.default_rows:
            object.__setattr__(self, "default_rows", len(self.labels) * 4 // 5)
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.classes:
            raise ValueError(
                f"labels of {self.title} must be in [0, {self.classes}), got {low} to {high}; "
                "rows without a label (often -1) cannot be used: choose another part of the data"
            )
