"""A tiny transformer for the smallest Temporal Clue puzzles, warm-started on perfect sheets.

`[model] name = "pyrl.repro.clue_model:folder"` of recipes/temporal_clue/mini.toml.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrl.models import pyrl_cache_dir
from pyrl.models.files import quiet_transformers, whole_folder
from pyrl.ops.linear_logprob import linear_logprob
from pyrl.tasks.generated import side
from pyrl.tasks.temporal_clue import names
from pyrl.tasks.temporal_clue.canonical import key
from pyrl.tasks.temporal_clue.compact import renamed, render_compact
from pyrl.tasks.temporal_clue.generate import Puzzle, generate
from pyrl.tasks.temporal_clue.prompt import answers
from pyrl.tasks.temporal_clue.sheet import perfect_sheet

_LOG = logging.getLogger("pyrl")

_VERSION = 1  # of what is written below; part of the folder's name
LEVEL = "2x2"
POOLS = (names.SUSPECTS, names.WEAPONS, names.ROOMS, names.MOTIVES)
#: What shorthand says in two words: one token each.
PHRASES = ("murder weapon", *(f"{way} of" for way in ("north", "south", "west", "east")))
UNKNOWN, END = "<unknown>", "<end>"
#: The times that a puzzle of one time can have, and whatever else is one token.
_REST = r"\d+:\d\d [AP]M|[A-Z]\.|\w+|\n|[^\w\s]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes of the model and of its warm start."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    puzzles: int = 1000
    """Of the training side; some are the same but for names and order."""
    steps: int = 600
    batch: int = 32
    lr: float = 4e-3
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
    texts = [(render_compact(p), perfect_sheet(answers(p))) for p in puzzles]
    tokenizer = word_tokenizer(text for pair in texts for text in pair)
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


def word_tokenizer(texts: Iterator[str] | Sequence[str]) -> Any:
    """A tokenizer of whole words: a name, a phrase, a time, a letter with its full stop, a word, a
    mark or a new line is a token; between them decoding puts spaces, which sheets may have."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*(name for pool in POOLS for name in pool), names.VICTIM, *PHRASES]
    # The longest first: "Who was motivated by" before "was motivated by".
    pattern = "|".join([*map(re.escape, sorted(known, key=len, reverse=True)), _REST])
    found = {token for text in texts for token in re.findall(pattern, text)}
    vocabulary = [UNKNOWN, END, *sorted(found | set(known))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END, pad_token=END,
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def random_model(vocabulary: int, end: int, recipe: Recipe) -> Any:
    """A random Llama that can attend to equal tokens and copy them from the start.

    Queries are keys, so that a token attends to its equals (RoPE aside), and values go back as they
    came: W_k = W_q, W_o = W_v^T, W_v a rotation times 0.7 (mimetic initialisation, arXiv
    2305.09828). From the usual random weights, finding out how to copy takes most of the training.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    width = recipe.width
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, width**-0.5)
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight.normal_(0, width**-0.5))
            rotation = torch.linalg.qr(torch.randn(width, width))[0]
            attention.v_proj.weight.copy_(0.7 * rotation)
            attention.o_proj.weight.copy_(0.7 * rotation.T)
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
