"""What a model's name stands for: a folder, something made on first use, or a Hugging Face id."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from pyrl.models.smollm2 import SMOLLM2_135M, smollm2_folder

_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def model_folder(name: str) -> str:
    """What transformers loads for `name`: a folder, or a Hugging Face id as it is.

    `smollm2-135m` is made on first use; "package.module:function" is the folder that function()
    returns, which makes it if need be. Raises ValueError for a path without a model, and for a
    function that cannot be had or gives no model's folder.
    """
    if name == SMOLLM2_135M:
        return str(smollm2_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(name, path)
    if _FUNCTION.fullmatch(name):
        return _made(name)
    # "owner/name" is the only form of id that holds a slash
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.exists():
        raise ValueError(f"model {name!r}: no such folder")
    return name


def _made(name: str) -> str:
    place, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place + ".").startswith(error.name + "."):
            raise  # the module exists, and something that it imports does not
        raise ValueError(f"model {name!r}: no module {place!r} on the import path") from None
    make = getattr(module, attribute, None)
    if not callable(make):
        raise ValueError(f"model {name!r}: {place} has no function {attribute!r}")
    folder = make()
    if not isinstance(folder, (str, os.PathLike)) or not Path(folder).is_dir():
        raise ValueError(f"model {name!r}: {attribute}() returned {folder!r}, which is no folder")
    return _checked(name, Path(folder))


def _checked(name: str, folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r}: the folder {folder} has no config.json")
    return str(folder)
