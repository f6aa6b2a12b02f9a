"""Text that came from a file or another program, made safe to show."""

import os


def printable(text: str) -> str:
    """`text` on one line, with a replacement character for each that is not printable.

    Those are control characters, which a terminal obeys, and marks that turn the direction of
    writing, which show a reader something else than what is there.
    """
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def from_here(path: str) -> str:
    """A path as seen from the working folder, if it lies in it."""
    folder = os.path.join(os.getcwd(), "")
    return path.removeprefix(folder)
