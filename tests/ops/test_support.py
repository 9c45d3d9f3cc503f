"""Support: its constructors against Hugging Face's own warpers, and the bookkeeping of CSR."""

import pytest
import torch

from pyrl import Support
from pyrl.ops.support import span_entries


def sets(support):
    return [
        set(support.ids[a:b].tolist())
        for a, b in zip(support.indptr[:-1], support.indptr[1:], strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_p": 0.8},
        {"top_k": 5},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 1, "top_p": 0.01, "min_p": 1.0},
    ],
    ids=str,
)
def test_from_logits_is_what_generate_would_leave(options, monkeypatch):
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    logits = 3 * torch.randn(50, 211, generator=torch.Generator().manual_seed(1))
    logits[:5] = logits[:5].round()  # ties
    logits[7, 1:] = -torch.inf
    config = LlamaConfig(
        vocab_size=211, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # transformers' defaults have a top_k of 50.
    settings = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    processors = model._get_logits_processor(settings, input_ids_seq_length=1, device="cpu")
    scores = processors(torch.zeros(50, 1, dtype=torch.long), logits.clone())
    monkeypatch.setattr("pyrl.ops.support.CHUNK", 211 * 9)  # several chunks
    ours = Support.from_logits(logits, **options)
    assert sets(ours) == sets(Support.from_masks(scores > -torch.inf))
    assert ours.indptr.dtype == torch.int64 and ours.ids.dtype == torch.int32
    assert (ours.indptr.diff() >= 1).all()


def test_steps_of_a_batch_become_its_padded_tokens():
    masks = torch.rand(3, 4, 17, generator=torch.Generator().manual_seed(0)) < 0.3  # [B, L, V]
    steps = [Support.from_masks(masks[:, t]) for t in range(4)]
    whole = Support.from_masks(masks)
    stacked = Support.stack(steps)
    assert torch.equal(stacked.indptr, whole.indptr) and torch.equal(stacked.ids, whole.ids)
    index = torch.tensor([7, 0, 7])
    taken = Support.from_masks(masks.view(-1, 17)[index])
    assert all(torch.equal(a, b) for a, b in zip(whole.take(index), taken, strict=True))
    keep = torch.rand(12) < 0.5
    taken = Support.from_masks(masks.view(-1, 17)[keep])
    assert all(torch.equal(a, b) for a, b in zip(whole.take(keep), taken, strict=True))
    joined = Support.cat([whole, taken, Support.from_masks(masks[:0])])
    assert sets(joined) == sets(whole) + sets(taken)


def test_span_entries():
    row, element = span_entries(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 3]))
    assert row.tolist() == [0, 0, 2, 2, 2] and element.tolist() == [5, 6, 9, 10, 11]


def test_no_tokens():
    for empty in (Support.from_logits(torch.empty(0, 9), top_p=0.5),
                  Support.from_masks(torch.empty(2, 0, 9, dtype=torch.bool))):  # fmt: skip
        assert empty.indptr.tolist() == [0] and empty.ids.numel() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: expected a finite number > 0"),
        ({"top_k": -1}, "top_k=-1: expected an integer >= 0"),
        ({"top_k": 2.0}, "top_k=2.0: expected an integer"),
        ({"top_p": 0.0}, "top_p=0.0: expected 0 < top_p <= 1"),
        ({"min_p": 1.5}, "min_p=1.5: expected 0 <= min_p <= 1"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Support.from_logits(torch.zeros(1, 3), **options)


def test_bad_parts_are_named():
    with pytest.raises(ValueError, match="masks: expected bool"):
        Support.from_masks(torch.zeros(2, 3))
    one, two = (Support.from_masks(torch.ones(n, 3, dtype=torch.bool)) for n in (1, 2))
    with pytest.raises(ValueError, match=r"equally many tokens, got \[1, 2\]"):
        Support.stack([one, two])
    with pytest.raises(ValueError, match="at least one"):
        Support.cat([])
