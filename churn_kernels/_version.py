"""The version of the package, from pyproject.toml."""

import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

PROJECT = "churn-kernels"


@cache
def version() -> str:
    """The version of the source checkout, or of the installed package."""
    source = Path(__file__).parents[1] / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == PROJECT:
            return str(project["version"])
    try:
        return metadata.version(PROJECT)
    except metadata.PackageNotFoundError:  # only the folder was copied
        return "0+unknown"
