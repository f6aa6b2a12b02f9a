"""Settings as frozen dataclasses: described, checked, read from a mapping, named by their hash."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

T = TypeVar("T")
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its default and the sentence that `--help` shows."""
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


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


def at_least(name: str, value: int, minimum: int, remedy: str) -> None:
    """Raises ValueError unless `value` >= `minimum`."""
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}; {remedy}")


def positive(name: str, value: float, remedy: str) -> None:
    """Raises ValueError unless `value` is finite and above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}; {remedy}")


def not_negative(name: str, value: float, remedy: str) -> None:
    """Raises ValueError unless `value` is finite and at least 0."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}; {remedy}")


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
            f"{name} must be one of {', '.join(names)}, got {value!r}"
            + (f"; {hint}" if hint else "")
        )


def nearest(word: str, words: Iterable[str]) -> str:
    """'did you mean ...?', or nothing where no word is near."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


# Reading and writing ------------------------------------------------------------------------------


def read_settings(path: Path) -> dict[str, Any]:
    """The tables of a .toml or .json file. Neither format can carry code.

    Raises: ValueError if there is no such file, or it is not what its name says.
    """
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"a settings file must end in .toml or .json, got {path}; rename it")
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"the settings file must exist, got {path}; check the path") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        kind = path.suffix[1:].upper()
        raise ValueError(f"{path} must hold {kind}, got: {error}; correct it there") from None
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
        raise ValueError(f"{where} must be a table of settings, got {values!r}; see the docs")
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
            raise ValueError(f"there is no setting {path!r}; {hint}")
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
    plain = to_mapping(settings) if dataclasses.is_dataclass(settings) else settings
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
            raise ValueError(f"{where} must be a list, got {value!r}; write it in brackets")
        return tuple(
            _typed(arguments[0], entry, f"{where}[{place}]") for place, entry in enumerate(value)
        )
    if origin is not None:  # a table of free form
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table, got {value!r}; write name = value in it")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be {_KINDS[hint]}, got {value!r}; correct its type")
    return value


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
