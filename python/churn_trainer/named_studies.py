"""The studies that come with the package: those of `make`, and the paper's recipes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from churn_kernels._files import write_atomically
from churn_trainer.config import Study
from churn_trainer.settings import nearest

OWN = ("digits", "claims")
"""Studies of the bundled digits; the others are the paper's recipes."""


def study_files() -> dict[str, Path]:
    """Name -> its TOML file, this package's own studies first."""
    folder = Path(str(resources.files("churn_trainer") / "studies"))
    files = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {name: files.pop(name) for name in OWN} | files


def find_study(name: str) -> Path:
    """The file of a named study, or the file of that path.

    Raises: ValueError naming the studies there are, or the nearest.
    """
    files = study_files()
    if name in files:
        return files[name]
    if Path(name).suffix in (".toml", ".json"):
        return Path(name)
    hint = nearest(name, files) or "or name a .toml or .json file"
    raise ValueError(f"study must be one of {', '.join(files)}, or a file, got {name!r}; {hint}")


def recipes() -> dict[str, Study]:
    """The paper's recipes by name."""
    return {name: Study.load(path) for name, path in study_files().items() if name not in OWN}


def write_recipes(folder: Path) -> list[Path]:
    """Copies the recipes' files, comments and all, into `folder`.

    Raises: ValueError if one of them would replace a file that differs; nothing is written then.
    """
    contents = {folder / f"{name}.toml": study_files()[name].read_bytes() for name in recipes()}
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise ValueError(
                f"write must be a folder without other recipes, got {folder}, whose {path.name} "
                "differs; name another folder"
            )
    for path, content in contents.items():
        write_atomically(path, content)
    return list(contents)
