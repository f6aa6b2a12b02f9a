"""Settings as frozen dataclasses: described, checked, read from a mapping, named by their hash."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from churn_kernels._files import parse_json, plain, read_text, reading

T = TypeVar("T")
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}

LARGEST = 2**63 - 1
"""Largest whole number of a setting: what a tensor of int64 holds."""

LARGEST_NUMBER = 1e38
"""Largest setting that is no whole number: one that every precision holds."""

SHOWN = 100
"""Characters of a wrong value that a message shows."""


def setting(default: Any, text: str, *, later: bool = False) -> Any:
    """A dataclass field with its default and the sentence that `--help` shows.

    Args:
        default: of the setting.
        text: the sentence.
        later: it joined after runs had been named: at its default it is no part of a name, so that
            these keep theirs.
    """
    metadata = {"help": text, "later": later}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def derive_seed(seed: int, *where: int) -> int:
    """A 63-bit seed that follows from `seed` and from the place it is for.

    Args:
        seed: any whole number from 0.
        where: whole numbers that tell this draw from others under the same seed.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=where)
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class Settings:
    """What a dataclass of settings that files describe inherits."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """What a .toml or .json file describes; what it leaves out has its default.

        Raises: ValueError naming the file or setting, what is wanted, what it got, the remedy.
        """
        return cls.from_mapping(read_settings(path))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """What nested tables describe. Raises: ValueError, as `load`."""
        return from_mapping(cls, values)

    def to_mapping(self) -> dict[str, Any]:
        """The settings as nested tables, which `from_mapping` reads."""
        return to_mapping(self)


# Checks -------------------------------------------------------------------------------------------


def at_least(name: str, value: int, minimum: int, remedy: str, most: int = LARGEST) -> None:
    """Raises ValueError unless `minimum` <= `value` <= `most`."""
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}; {remedy}")
    at_most(name, value, most, remedy)


def at_most(name: str, value: float, most: float, remedy: str) -> None:
    """Raises ValueError if `value` is above `most`."""
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}; {remedy}")


def check_memory(what: str, size: float, remedy: str) -> None:
    """Raises ValueError if `size` bytes are more than this machine's memory has in all."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"{what} must fit into the {memory / 2**30:.3g} GiB of this machine's memory, got "
            f"{size / 2**30:.3g} GiB; {remedy}"
        )


def positive(name: str, value: float, remedy: str) -> None:
    """Raises ValueError unless 0 < `value` <= `LARGEST_NUMBER`."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}; {remedy}")
    at_most(name, value, LARGEST_NUMBER, remedy)


def not_negative(name: str, value: float, remedy: str) -> None:
    """Raises ValueError unless 0 <= `value` <= `LARGEST_NUMBER`."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}; {remedy}")
    at_most(name, value, LARGEST_NUMBER, remedy)


def share(name: str, value: float, remedy: str) -> None:
    """Raises ValueError unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}; {remedy}")


def one_of(name: str, value: str, allowed: Iterable[str], remedy: str = "") -> None:
    """Raises ValueError, naming the nearest, unless `value` is among `allowed`."""
    names = list(allowed)
    if value not in names:
        hint = nearest(value, names) or remedy
        raise ValueError(
            f"{name} must be one of {', '.join(names)}, got {shown(value)}"
            + (f"; {hint}" if hint else "")
        )


def shown(value: Any) -> str:
    """A wrong value as a message shows it: cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 300:  # `str` refuses thousands of digits
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}\N{HORIZONTAL ELLIPSIS}"


def nearest(word: str, words: Iterable[str]) -> str:
    """'did you mean ...?', or nothing where no word is near."""
    close = difflib.get_close_matches(word[:SHOWN], list(words), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


# Reading and writing ------------------------------------------------------------------------------


def read_settings(path: Path) -> dict[str, Any]:
    """The tables of a .toml or .json file. Neither format can carry code.

    Raises: ValueError if there is no such file, it cannot be read, or it is not what its name says.
    """
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"a settings file must end in .toml or .json, got {path}; rename it")
    if not os.path.exists(path):  # whatever the system says of such a name
        raise ValueError(f"the settings file must exist, got {path}; check the path")
    if path.is_dir():
        raise ValueError(f"{path} must be a file of settings, got a folder; name the file in it")
    with reading(path, path.suffix[1:].upper(), "correct it there"):
        text = read_text(path)
        tables = plain(tomllib.loads(text)) if path.suffix == ".toml" else parse_json(text)
    if not isinstance(tables, dict):
        raise ValueError(f"{path} must hold tables of settings, got a {type(tables).__name__}")
    return tables


def from_mapping(kind: type[T], values: Mapping[str, Any], where: str = "", base: Any = None) -> T:
    """A settings dataclass from a mapping, nested tables included.

    Args:
        kind: the dataclass. Its `preset` method, where it has one, gives the base for `values`.
        values: settings by name; what is missing stays as in `base`.
        where: dotted name of the table, for messages.
        base: settings to start from; None: the defaults.
    Raises: ValueError naming the setting, what it wants, what it got, and the nearest name.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a table of settings, got {shown(values)}; see the docs")
    preset = getattr(kind, "preset", None)
    if preset is not None and "name" in values:
        base = preset(_typed(str, values["name"], f"{where}.name"))
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    given = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        if name not in fields:
            hint = nearest(name, fields) or f"there are {', '.join(fields)}"
            raise ValueError(f"there is no setting {shown(path)}; {hint}")
        if dataclasses.is_dataclass(hints[name]):
            inner = getattr(base, name) if base is not None else None
            given[name] = from_mapping(hints[name], value, path, inner)
        else:
            given[name] = _typed(hints[name], value, path)
    return kind(**given) if base is None else dataclasses.replace(base, **given)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables of which `above` wins, setting by setting."""
    tables = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(tables.get(name), Mapping)
        tables[name] = merged(tables[name], value) if both else value
    return tables


def to_mapping(settings: Any) -> dict[str, Any]:
    """The settings as plain nested dicts of JSON's types; nothing that is None."""
    return {
        field.name: _plain(value)
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) is not None
    }


def to_toml(settings: Any) -> str:
    """The settings as TOML, one table for each nested dataclass."""
    return "\n".join(_toml_tables(to_mapping(settings), "")).strip() + "\n"


def fingerprint(settings: Any) -> str:
    """12 hexadecimal digits that name the settings: SHA-256 of their JSON with sorted keys."""
    plain = _named(settings) if dataclasses.is_dataclass(settings) else settings
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _named(settings: Any) -> dict[str, Any]:
    """`to_mapping` without what joined later and is at its default."""
    table = to_mapping(settings)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            table[field.name] = _named(value)
        elif field.metadata.get("later") and value == field.default:
            del table[field.name]
    return table


def without_none(hint: Any) -> Any:
    """X of the type "X | None", any other type as it is."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks for; a whole number will do for a float."""
    hint = without_none(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(
        hint
    ):  # in a list; a name can stand for the whole table
        named = getattr(hint, "named", None)
        return (
            named(value) if named and isinstance(value, str) else from_mapping(hint, value, where)
        )
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, got {shown(value)}; write it in brackets")
        return tuple(
            _typed(arguments[0], entry, f"{where}[{place}]") for place, entry in enumerate(value)
        )
    if origin is not None:  # a table of free form
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{where} must be a table, got {shown(value)}; write name = value in it"
            )
        _check_plain(value, where)
        return dict(value)
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"{where} must be within 2^63, got {shown(value)}; correct it")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be {_KINDS[hint]}, got {shown(value)}; correct its type")
    return value


def _check_plain(value: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless JSON, whose text names the run, has such values."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} must hold texts, finite numbers, lists and tables, got: {error}; write such"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return to_mapping(value) if dataclasses.is_dataclass(value) else value


def _toml_tables(table: Mapping[str, Any], name: str) -> Iterable[str]:
    lines = [
        f"{key} = {_toml_value(value)}"
        for key, value in table.items()
        if not isinstance(value, dict)
    ]
    if lines:
        yield "\n".join([f"[{name}]", *lines] if name else lines) + "\n"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _toml_tables(value, f"{name}.{key}" if name else key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value)  # JSON's words, numbers and quoted texts are TOML's too
