"""A TOML recipe and flags become a Config.

`load` is the only way in. An unknown key or a value out of range becomes one ConfigError line
each: the file or flag, the key path, the value, and what is allowed there.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import annotated_types
import pydantic

from pyrl.trainer.algorithm_config import Stage
from pyrl.trainer.config import Config, Section, flatten
from pyrl.trainer.sampling_config import MixConfig, TaskConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


class ConfigError(ValueError):
    """One line for every wrong value: place, key, value, what is allowed."""


def load(recipe: Path | None, overrides: Mapping[str, str] | None = None, **values: Any) -> Config:
    """The recipe, then `overrides` ({"optimizer.lr": "1e-5"}, read as TOML values).

    `values` are sections as Python mappings, below the recipe (for tests and scripts).
    Raises ConfigError naming file or flag, key path, value and what is allowed.
    """
    tree: dict[str, Any] = json.loads(json.dumps(values))
    place = {key: "argument" for key, _ in flatten(tree)}
    if recipe is not None:
        if not recipe.is_file():
            raise ConfigError(f"{recipe}: no such recipe file")
        try:
            read = tomllib.loads(recipe.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{recipe}: not TOML: {error}") from None
        _merge(tree, read)
    for key, text in (overrides or {}).items():
        place[key] = f"--{key}"
        branch = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"--{key}: {parent!r} is a value, not a section")
        branch[leaf] = parse_value(text)
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = [_explain(e, place, str(recipe or "arguments")) for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def parse_value(text: str) -> Any:
    """A flag's text as a TOML value (1e-5, true, [1, 2]); "none" unsets; all else is a string."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _explain(error: Any, place: Mapping[str, str], recipe: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    message = error["msg"].removeprefix("Value error, ")
    # A rule over several keys: the flags that it speaks of, and the recipe for what they leave.
    named = [
        flag
        for name, flag in place.items()
        if (not path or name.split(".")[0] == path[0]) and name.split(".")[-1] in message
    ]
    both = ", ".join(dict.fromkeys([*named, *([] if recipe == "arguments" else [recipe])]))
    where = place.get(key) or (both if error["type"] == "value_error" else "") or recipe
    if error["type"] == "extra_forbidden":
        return unknown_key(key, where)
    if not path or (len(path) == 1 and error["type"] == "value_error"):
        return f"{where}: {'[' + key + '] ' if key else ''}{message}"
    return f"{where}: {key} = {error['input']!r}: {message}{_range(path)}"


def unknown_key(key: str, where: str) -> str:
    """The message for a key that no section has, with the nearest that exists."""
    *parents, leaf = key.split(".")
    cls = _section(parents)
    known = sorted(cls.model_fields) if cls else []
    close = difflib.get_close_matches(leaf, known, n=1)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    here = f"; known here: {', '.join(known)}" if known else ""
    return f"{where}: unknown key {key!r}{guess}{here}"


def _section(path: list[str]) -> type[Section] | None:
    cls: Any = Config
    for part in path:
        if part.isdigit() and cls is Stage:  # stages.0
            continue
        field = cls.model_fields.get(part) if cls is not MixConfig else None
        if cls is TaskConfig and part == "mix":
            cls = MixConfig
            continue
        if cls is MixConfig:  # task.mix.NAME
            return cls
        if part == "stages":
            cls = Stage
            continue
        if field is None or not isinstance(field.annotation, type):
            return None
        if not issubclass(field.annotation, Section):
            return None
        cls = field.annotation
    return cls


def _range(path: list[str]) -> str:
    """ " (allowed: > 0, <= 1)" from a field's own bounds."""
    cls = _section(path[:1])
    field = cls.model_fields.get(path[1]) if cls and len(path) > 1 else None
    if field is None:
        return ""
    signs = {annotated_types.Gt: ">", annotated_types.Ge: ">="}
    signs |= {annotated_types.Lt: "<", annotated_types.Le: "<="}
    bounds = []
    for item in field.metadata:
        if type(item) in signs:
            (value,) = dataclasses.astuple(item)
            bounds.append(f"{signs[type(item)]} {value}")
    return f" (allowed: {', '.join(bounds)})" if bounds else ""
