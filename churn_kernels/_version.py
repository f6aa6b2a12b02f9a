"""The version of the package, as pyproject.toml has it."""

import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

PROJECT = "churn-kernels"


@cache
def version() -> str:
    """Of a source checkout its own; of an installed package that which was installed."""
    source = Path(__file__).parents[1] / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == PROJECT:
            return str(project["version"])
    try:
        return metadata.version(PROJECT)
    except metadata.PackageNotFoundError:  # a copy of the folder alone
        return "0+unknown"
