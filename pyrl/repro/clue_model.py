"""A tiny transformer for the smallest Temporal Clue puzzles, warm-started on perfect sheets.

`[model] name = "pyrl.repro.clue_model:folder"` of recipes/temporal_clue/mini.toml.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrl.models import pyrl_cache_dir
from pyrl.models.files import quiet_transformers, whole_folder
from pyrl.ops.linear_logprob import linear_logprob
from pyrl.tasks.generated import side
from pyrl.tasks.temporal_clue.canonical import key
from pyrl.tasks.temporal_clue.compact import renamed, render_compact
from pyrl.tasks.temporal_clue.generate import Puzzle, generate
from pyrl.tasks.temporal_clue.prompt import answers
from pyrl.tasks.temporal_clue.sheet import perfect_sheet

_LOG = logging.getLogger("pyrl")

_VERSION = 1  # of what is written below; part of the folder's name
LEVEL = "2x2"
UNKNOWN, END = "<unknown>", "<end>"
#: A letter with its full stop; a line, or what follows the letter, with the new line.
_TOKEN = r"[A-Z]\.(?= )|[^\n ][^\n]*\n?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes of the model and of its warm start."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    puzzles: int = 1000
    """Of the training side; some are the same but for names and order."""
    steps: int = 200
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 50
    seed: int = 0


def folder() -> Path:
    """The model's folder, made on first use: a minute or two on two CPU cores."""
    found = pyrl_cache_dir() / f"temporal-clue-{LEVEL}-v{_VERSION}"
    if not found.is_dir():
        _LOG.warning("making a model for puzzles in %s: once, about two minutes", found)
        with whole_folder(found, keep_existing=True) as aside, quiet_transformers():
            make(aside)
    return found


def quick_folder() -> Path:
    """One that has learned nothing, in a second: for runs that only show that the code works."""
    found = pyrl_cache_dir() / f"temporal-clue-{LEVEL}-quick-v{_VERSION}"
    if not found.is_dir():
        with whole_folder(found, keep_existing=True) as aside, quiet_transformers():
            make(aside, Recipe(width=16, layers=1, heads=2, puzzles=12, steps=3, batch=4))
    return found


def make(folder: Path, recipe: Recipe = Recipe()) -> None:
    """Writes the warm-started model with its tokenizer, a function of the recipe."""
    puzzles = training_puzzles(recipe.puzzles)
    texts = [(render_compact(p), perfect_sheet(answers(p)) + "\n") for p in puzzles]
    tokenizer = line_tokenizer(text for pair in texts for text in pair)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = random_model(len(tokenizer), tokenizer.eos_token_id, recipe)
        warm_start(model, tokenizer, texts, recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def training_puzzles(count: int) -> list[Puzzle]:
    """The first `count` puzzles of the seeds 0, 1, … that belong to the training side."""
    drawn = (generate(seed, LEVEL) for seed in itertools.count())
    ours = (renamed(puzzle) for puzzle in drawn if side(key(puzzle)) == "train")
    return list(itertools.islice(ours, count))


def line_tokenizer(texts: Iterable[str]) -> Any:
    """A tokenizer for which a whole clue, question or answer is one token, with its new line: there
    is nothing to read, only to deduce. What `texts` lack is unknown, word by word.

    Decoding puts a space between tokens; a sheet may have it.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = {token for text in texts for token in re.findall(_TOKEN, text)}
    vocabulary = [UNKNOWN, END, *sorted(found)]
    pattern = "|".join([*map(re.escape, sorted(found, key=len, reverse=True)), r"\w+|[^\w\s]"])
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END, pad_token=END,
        clean_up_tokenization_spaces=False, model_max_length=256,
    )  # fmt: skip


def random_model(vocabulary: int, end: int, recipe: Recipe) -> Any:
    """A random Llama in float32. Its embeddings are large beside its other weights: the head is
    tied to them, and equal tokens should find each other from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = recipe.width
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.02, bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).float()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    return model


def warm_start(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], recipe: Recipe
) -> float:
    """AdamW on −log π(sheet) of random puzzles; returns the last loss, nats a token of a sheet."""
    generator = torch.Generator().manual_seed(recipe.seed)
    tokens, sheet = _encoded(tokenizer, texts)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    head, value = model.get_output_embeddings().weight, float("nan")
    for step in range(recipe.steps):
        chosen = torch.randint(len(texts), (recipe.batch,), generator=generator)
        mask = sheet[chosen]
        length = int(mask.any(0).nonzero().max()) + 1
        mask = mask[:, 1:length]
        batch = tokens[chosen, :length]
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        logprob = linear_logprob(hidden, head, batch[:, 1:], mask=mask).logprob
        loss = -logprob.sum() / mask.sum()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / recipe.warmup)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        value = float(loss.detach())
    return value


def _encoded(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids [N, T], ended and padded with the end token, and which are a sheet's, bool."""
    rows = [
        (tokenizer.encode(prompt), [*tokenizer.encode(sheet), tokenizer.eos_token_id])
        for prompt, sheet in texts
    ]
    tokens = torch.full((len(rows), max(len(p) + len(s) for p, s in rows)), tokenizer.eos_token_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i, (prompt, sheet) in enumerate(rows):
        tokens[i, : len(prompt) + len(sheet)] = torch.tensor([*prompt, *sheet])
        mask[i, len(prompt) : len(prompt) + len(sheet)] = True
    return tokens, mask
