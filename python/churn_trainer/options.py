"""Command-line options made from the settings' dataclasses: one place has names, defaults, help."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from churn_trainer.config import MOST_RUNS, Run, Seeds
from churn_trainer.settings import at_least, merged, read_settings, without_none

ConfigOption = Annotated[
    Path | None, typer.Option(help="TOML or JSON file of settings; an option wins over it.")
]
SeedOption = Annotated[int, typer.Option(help="Every seed that has no option of its own.")]
AcceleratorOption = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
CheckpointSecondsOption = Annotated[
    float, typer.Option(help="Time between checkpoints; 0: one after every step.")
]
TrustOption = Annotated[
    list[str] | None, typer.Option(help="Package that the model may be imported from.")
]

_PREFIXES = {
    "": "",
    "data": "data-",
    "data.synthetic": "synthetic-",
    "model": "model-",
    "method": "method-",
    "optimisation": "",
    "seeds": "seed-",
}
"""Table of settings -> what its options begin with; a table's `name` is the table's own option."""


@dataclasses.dataclass(frozen=True)
class _Option:
    parameter: str
    flag: str
    path: tuple[str, ...]
    kind: Any
    field: dataclasses.Field[Any]


def settings_command(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for every setting of a `Run`.

    The command takes `given`, nested tables of the settings that were said on the command line,
    besides its own options.
    """
    options = list(_options(Run, ()))

    def wrapped(**values: Any) -> None:
        given: dict[str, Any] = {}
        for option in options:
            value = values.pop(option.parameter)
            if value is None or value == []:
                continue
            table = given
            for name in option.path[:-1]:
                table = table.setdefault(name, {})
            table[option.path[-1]] = value
        command(given=given, **values)

    own = inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name, parameter in own.items() if name != "given"]
    parameters += [
        inspect.Parameter(
            option.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(option),
        )
        for option in options
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    return wrapped


def _options(kind: Any, path: tuple[str, ...]) -> typing.Iterator[_Option]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, place = without_none(hints[field.name]), (*path, field.name)
        if dataclasses.is_dataclass(hint):
            yield from _options(hint, place)
        elif typing.get_origin(hint) is not dict:  # tables of free form are for files
            table = ".".join(path)
            flag = path[-1] if field.name == "name" else _PREFIXES[table] + field.name
            flag = flag.replace("_", "-")
            yield _Option(flag.replace("-", "_"), flag, place, hint, field)


def _annotation(option: _Option) -> Any:
    default = option.field.default
    if option.path[0] == "method" and option.field.name != "name":
        shown = "the method's"
    elif default in (None, "", ()):
        shown = "none"
    elif isinstance(default, tuple):
        shown = " ".join(map(str, default))
    else:
        shown = str(default).lower() if isinstance(default, bool) else str(default)
    panel = option.path[-2] if option.path[1:] else "run"
    text = f"{option.field.metadata['help']} Default: {shown}."
    kind, flags = option.kind, [f"--{option.flag}"]
    if typing.get_origin(kind) is tuple:
        kind, text = list[typing.get_args(kind)[0]], f"{text} Repeat it for each."  # type: ignore[misc]
    elif kind is bool:
        flags = [f"--{option.flag}/--no-{option.flag}"]
    return typing.Annotated[
        kind | None, typer.Option(*flags, help=text, rich_help_panel=panel, show_default=False)
    ]


def runs_of(given: dict[str, Any], config: Path | None, seed: int, runs: int = 1) -> list[Run]:
    """The runs that a file and the command line describe, the command line before the file.

    They share the split; all other seeds are one higher in each run than in the one before.

    Raises: ValueError for wrong settings.
    """
    at_least("runs", runs, 1, "1 is the default", MOST_RUNS)
    tables = merged(read_settings(config) if config else {}, given)
    names = [field.name for field in dataclasses.fields(Seeds)]
    seeds = [{**dict.fromkeys(names, seed + number), "split": seed} for number in range(runs)]
    return [Run.from_mapping(merged({"seeds": below}, tables)) for below in seeds]
