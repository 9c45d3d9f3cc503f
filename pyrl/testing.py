"""Tiny random models for tests, a working Hugging Face folder in milliseconds, no download; and
random sampling supports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pyrl import Support

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(vocab_size: int = 320) -> Any:
    """A byte-level BPE tokenizer of exactly `vocab_size` ids with a chat template.

    Ids 0-2 are `SPECIAL_TOKENS` (`<|im_end|>` is eos and pad), then the 256 bytes, then merges of
    lower-case letter pairs, then `<|unused-i|>`: every id decodes, every text round-trips.

    Raises ValueError when `vocab_size` < 259.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*SPECIAL_TOKENS, *letters]
    if vocab_size < len(base):
        raise ValueError(f"vocab_size={vocab_size}: expected at least {len(base)}")
    alphabet = "etaoinshrdlucmfwypvbgkjqxz"
    merges = [(a, b) for a in alphabet for b in alphabet][: vocab_size - len(base)]
    tokens = base + [a + b for a, b in merges]
    unused = [f"<|unused-{i}|>" for i in range(len(tokens), vocab_size)]

    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens(unused)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(architecture: str = "llama", vocab_size: int = 320, **overrides: Any) -> Any:
    """A 2-layer config of D=32, 4 query heads over 2 KV heads, for any text architecture.

    `architecture` is transformers' model type (`llama`, `qwen3`, `gemma2`, `gemma3_text`, ...).
    `initializer_range` is 0.2: with the usual 0.02 a tiny model barely attends, and a test of
    attention would see nothing.
    """
    from transformers import AutoConfig

    values = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return AutoConfig.for_model(architecture, **{**values, **overrides})


def tiny_model_folder(
    path: str | Path,
    vocab_size: int = 320,
    seed: int = 0,
    architecture: str = "llama",
    **config: Any,
) -> str:
    """Write a random float32 causal language model with its tokenizer to `path`; returns `path`.

    The same `seed` writes the same weights; the global RNG is left as it was. Extra keyword
    arguments go to the config (`tiny_config`).
    """
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, vocab_size, **config))
    model = model.float()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer(vocab_size).save_pretrained(folder)
    return str(folder)


def random_support(
    target: torch.Tensor,
    vocabulary: int,
    keep: torch.Tensor,
    *,
    largest: int = 40,
    seed: int = 0,
    dtype: torch.dtype = torch.int32,
) -> Support:
    """A support of 1 to `largest` tokens in any order around each kept target.

    Unkept tokens get what a reader would trip over: ids outside [0, vocabulary), repetitions, none.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens, kept = target.reshape(-1).tolist(), keep.reshape(-1).tolist()
    rows = []
    for i, token in enumerate(tokens):
        if not kept[i]:
            rows.append(torch.tensor([-7, vocabulary, vocabulary] if i % 2 else [], dtype=dtype))
            continue
        size = int(torch.randint(1, min(largest, vocabulary) + 1, (), generator=draw))
        others = torch.randperm(vocabulary, generator=draw)[:size]
        ids = torch.cat([others[others != token][: size - 1], torch.tensor([token])])
        rows.append(ids[torch.randperm(len(ids), generator=draw)])
    lengths = torch.tensor([0, *map(len, rows)])
    ids = torch.cat([torch.empty(0, dtype=dtype), *rows]).to(dtype)
    return Support(lengths.cumsum(0), ids).to(target.device)
