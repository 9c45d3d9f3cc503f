"""`get_task`: a task by name, or a class of the user's own by "module:Class" or "file.py:Class"."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pyrl.tasks.protocol import Prompt, Task, overlap
from pyrl.tasks.worker import describe

#: name → "module:Class", imported on first use. A new built-in task is one row here.
TASKS = {
    "code": "pyrl.tasks.code:Code",
    "ifeval": "pyrl.tasks.ifeval:IFEval",
    "instructions": "pyrl.tasks.instructions:Instructions",
    "letters": "pyrl.tasks.letters:Letters",
    "logic": "pyrl.tasks.logic:Logic",
    "mathematics": "pyrl.tasks.mathematics:Mathematics",
    "stem": "pyrl.tasks.stem:Stem",
    "temporal_clue": "pyrl.tasks.temporal_clue.task:TemporalClue",
}

#: How many prompts of each split are compared when a task of the user's own is loaded.
OVERLAP_LIMIT = 10_000

#: module name → file, of the files loaded by `load_file`; scoring processes load them again.
_files: dict[str, str] = {}


def task_names() -> list[str]:
    """The names of the built-in tasks."""
    return sorted(TASKS)


def get_task(name: str, /, **options: Any) -> Task:
    """The task `name`, constructed with `options`.

    `name`: a built-in task, "package.module:Class", or "path/to/file.py:Class" for one's own.
    Raises ValueError for an unknown name, an unknown option (listing the allowed ones), a class
    that is not a task, an empty training split, or a prompt that is in both splits.
    """
    target = TASKS.get(name)
    own = target is None and ":" in name
    if target is None and not own:
        raise ValueError(
            f"unknown task {name!r}: expected one of {', '.join(task_names())}, or your own as "
            '"module:Class" or "path/to/file.py:Class"'
        )
    factory = _find(name, target or name)
    _check_options(name, factory, options)
    try:
        task = factory(**options)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from error
    except TypeError as error:  # most likely an option of the wrong kind
        raise ValueError(f"task {name!r} with options {options}: {describe(error)}") from error
    _check_task(name, task)
    if own:
        shared = overlap(task, OVERLAP_LIMIT)
        if shared is not None:
            raise ValueError(
                f"task {name!r}: held-out prompt {shared!r} is also a training prompt; "
                "pyrl.tasks.split_prompts makes disjoint splits of a list"
            )
    return task


def load_file(path: str, module_name: str | None = None) -> ModuleType:
    """The Python file as a module, once. Raises ValueError when there is no such file."""
    file = Path(path).expanduser().resolve()
    name = (
        module_name or f"pyrl_task_{file.stem}_{hashlib.sha1(str(file).encode()).hexdigest()[:8]}"
    )
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ValueError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look it up by name
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[name]
        raise ValueError(f"{error.filename or path}, line {error.lineno}: {error.msg}") from None
    except BaseException:
        del sys.modules[name]
        raise
    _files[name] = str(file)
    return module


def loaded_files() -> dict[str, str]:
    """module name → path of every file that `load_file` has loaded in this process."""
    return dict(_files)


def _find(name: str, target: str) -> Callable[..., Any]:
    place, _, attribute = target.rpartition(":")
    if place.endswith(".py"):
        try:
            module = load_file(place)
        except ValueError as error:
            raise ValueError(f"task {name!r}: {error}") from None
    else:
        module = _import(name, place)
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [n for n, v in vars(module).items() if inspect.isclass(v) and n[0] != "_"]
        raise ValueError(
            f"task {name!r}: {place} has no class {attribute!r}; "
            f"it has {', '.join(public) or 'no class at all'}"
        )
    return found


def _import(name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place + ".").startswith(error.name + "."):
            raise  # the module exists, and something that it imports does not
        raise ValueError(
            f"task {name!r}: no module {place!r} on the import path; a file can be named directly, "
            'as "path/to/file.py:Class"'
        ) from None


def _check_options(name: str, factory: Callable[..., Any], options: dict[str, Any]) -> None:
    signature = inspect.signature(factory)
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    shown = ", ".join(n if p.default is p.empty else f"{n}={p.default!r}" for n, p in known.items())
    for option in options:
        if option not in known:
            raise ValueError(
                f"task {name!r} has no option {option!r}; its options: {shown or 'none'}"
            )
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if missing:
        raise ValueError(f"task {name!r} needs the option {missing[0]!r}; its options: {shown}")


def _check_task(name: str, task: Any) -> None:
    if not isinstance(getattr(task, "name", None), str):
        raise ValueError(f"task {name!r}: {type(task).__name__} has no string attribute 'name'")
    for method in ("prompts", "score"):
        if not callable(getattr(task, method, None)):
            raise ValueError(f"task {name!r}: {type(task).__name__} has no method {method!r}")
    for split in ("train", "heldout"):
        prompts = task.prompts(split)
        if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
            raise ValueError(
                f"task {name!r}: prompts({split!r}) returned {type(prompts).__name__}; "
                "expected a sequence of Prompt"
            )
        if len(prompts) == 0:
            if split == "train":
                raise ValueError(f"task {name!r}: the training split is empty")
            continue  # allowed: a run without evaluation needs none
        if not isinstance(prompts[0], Prompt):
            raise ValueError(
                f"task {name!r}: prompts({split!r})[0] is {type(prompts[0]).__name__}; "
                "expected pyrl.tasks.Prompt"
            )
