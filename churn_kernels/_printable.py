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


def excerpt(text: str, most: int = 300) -> str:
    """`printable(text)`, cut to `most` characters."""
    clean = printable(text)
    return clean if len(clean) <= most else clean[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def from_here(path: str) -> str:
    """A path as seen from the working folder, if it lies in it."""
    folder = os.path.join(os.getcwd(), "")
    return path.removeprefix(folder)
