"""Shared prefixes: every target is predicted from exactly its own context, whatever is shared."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.packing import PackedBatch, Sample, pack

SHARING = [
    {"share_prefix": False},
    {"aligned": False, "share_prefix": False},
    {},
    {"aligned": False},
]


@st.composite
def conversations(draw, max_length=14):
    """Samples over three token ids whose prompts and completions often begin alike."""
    stems = draw(
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=3)
    )
    out = []
    for _ in range(draw(st.integers(0, 10))):
        prompt = draw(st.sampled_from(stems)) + draw(st.lists(st.integers(0, 2), max_size=3))
        completion = draw(st.lists(st.integers(0, 2), max_size=max_length - len(prompt)))
        c = len(completion)
        out.append(
            Sample(
                prompt,
                completion,
                old_logprob=[-1.0 - j for j in range(c)] if draw(st.booleans()) else None,
                advantage=draw(st.sampled_from([-1.0, 0.0, 2.0])),
                mask=draw(st.none() | st.lists(st.booleans(), min_size=c, max_size=c)),
                weight=float(draw(st.integers(1, 3))),
            )
        )
    return out


def contexts(row: PackedBatch) -> list[list[int]]:
    """The tokens that each target of a row is predicted from, as attention sees them."""
    index = range(row.num_tokens) if row.hidden_index is None else row.hidden_index.tolist()
    last = row.last.tolist()
    seen = [[j for j in range(i + 1) if i < last[j]] for i in range(row.num_tokens)]
    for i, tokens in enumerate(seen):
        assert [int(row.positions[j]) for j in tokens] == list(range(len(tokens))), i
    return [[int(row.tokens[j]) for j in seen[i]] for i in index]


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@settings(deadline=None)
@given(conversations(), st.integers(14, 40))
def test_every_target_has_its_own_context(sharing, batch, capacity):
    packed = pack(batch, capacity, **sharing)
    seen = []
    for row in packed:
        assert 0 < row.num_tokens <= capacity
        found = contexts(row)
        at = row._completion_index.tolist()
        for i, tokens in zip(
            sorted(row.sequence_ids.tolist()),
            row.unpack(torch.arange(len(found)), None),
            strict=True,
        ):
            sample = batch[i]
            seen.append(i)
            whole = [*sample.prompt, *sample.completion]
            p, c = len(sample.prompt), len(sample.completion)
            assert [found[r] for r in tokens] == [whole[: p + j] for j in range(c)]
            assert row.target[tokens].tolist() == sample.completion
            mask = [True] * c if sample.mask is None else sample.mask
            assert row.loss_mask[tokens].tolist() == mask
            assert row.advantages[tokens].tolist() == [sample.advantage] * c
            assert row.weights[tokens].tolist() == [sample.weight] * c
            if row.old_logprob is not None:
                old = row.old_logprob[tokens]
                own = sample.old_logprob
                assert old.isnan().all() if own is None else old.tolist() == own
        others = torch.ones(len(found), dtype=torch.bool)
        others[at] = False
        assert not row.loss_mask[others].any() and not row.advantages[others].any()
        for s, i in enumerate(row.sequence_ids.tolist()):  # one run of targets per sample
            run = row.target[row.cu_seqlens[s] : row.cu_seqlens[s + 1]]
            c = len(batch[i].completion)
            assert row.hidden_index is None or len(run) == c
            assert (
                run[len(run) - c - 1 : -1].tolist() == batch[i].completion
                if row.hidden_index is None
                else run.tolist() == batch[i].completion
            )
    assert sorted(seen) == list(range(len(batch)))
    assert sum(row.num_tokens for row in packed) == packed.num_tokens
    assert packed.sample_tokens == sum(len(s.prompt) + len(s.completion) for s in batch)
    if sharing.get("share_prefix", True):
        assert packed.num_tokens <= packed.sample_tokens
    else:
        assert packed.num_tokens == packed.sample_tokens


@settings(deadline=None)
@given(conversations(), st.integers(14, 40))
def test_nothing_is_computed_twice_where_a_row_holds_all(batch, capacity):
    trie = {
        (*s.prompt, *s.completion)[: k + 1]
        for s in batch
        for k in range(len(s.prompt) + len(s.completion))
    }
    assert pack(batch, 1000, aligned=False).num_tokens == len(trie)
    heads = {tuple(s.prompt[: k + 1]) for s in batch for k in range(len(s.prompt) - 1)}
    own = sum(1 + len(s.completion) for s in batch)
    assert pack(batch, 1000).num_tokens == len(heads) + own


def test_ids_say_who_is_whose_child():
    """i attends j iff j <= i and (group[i] = group[j] or parent[i] = group[j])."""
    batch = pack([Sample([5, 6, 7], [i, i]) for i in range(3)] + [Sample([8], [1])], 100)
    group, parent = batch.group_ids, batch.parent_ids
    i, j = torch.arange(batch.num_tokens)[:, None], torch.arange(batch.num_tokens)
    theirs = (j <= i) & ((group[:, None] == group) | (parent[:, None] == group))
    assert theirs.equal((j <= i) & (i < batch.last))
    assert batch.tokens.tolist() == [5, 6, 7, 0, 0, 7, 1, 1, 7, 2, 2, 8, 1]
    assert batch.target.tolist() == [6, 7, 0, 0, 0, 1, 1, 0, 2, 2, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 11, 13]


def test_first_tokens_come_from_the_prompt():
    batch = pack([Sample([5, 6], [1, 2]), Sample([5, 6], [3])], 100, aligned=False)
    assert batch.tokens.tolist() == [5, 6, 1, 2, 3]
    assert batch.hidden_index.tolist() == [1, 2, 1] and batch.target.tolist() == [1, 2, 3]
    assert batch.at_targets(batch.tokens).tolist() == [6, 1, 6]
    with pytest.raises(ValueError, match=r"hidden of shape \[3, 2\]: expected \[5\]"):
        batch.at_targets(torch.zeros(3, 2))


def test_identical_samples_are_computed_once_and_learned_twice():
    batch = pack([Sample([5, 6], [1, 2], advantage=a) for a in (1.0, -2.0)], 100, aligned=False)
    assert batch.num_tokens == 4 and batch.hidden_index.tolist() == [1, 2, 1, 2]
    assert batch.advantages.tolist() == [1, 1, -2, -2]


def test_a_prefix_that_saves_too_little_is_computed_again():
    samples = [Sample([5, 6], [7, i]) for i in range(2)]
    # Shared: 3 + 2 tokens in 3 segments; alone: 8 tokens in 2.
    for cost, tokens in ((2.9, 5), (3.1, 8)):
        assert pack(samples, 99, aligned=False, segment_cost=cost).num_tokens == tokens
    # The shared 3 tokens attend 6 pairs, which are computed twice otherwise.
    assert pack(samples, 99, aligned=False, segment_cost=3.1, area_cost=0.1).num_tokens == 5


def clue_batch(generator, prompts=1):
    """50 completions a prompt, as in Temporal Clue: P = 1220, C = 1000."""
    out = []
    for _ in range(prompts):
        prompt = torch.randint(50_000, (1220,), generator=generator)
        out += [
            Sample(prompt, torch.randint(50_000, (1000,), generator=generator)) for _ in range(50)
        ]
    return out


def test_tokens_of_a_temporal_clue_group():
    samples = clue_batch(torch.Generator().manual_seed(0))
    assert pack(samples, 16_384, share_prefix=False).num_tokens == 111_000
    assert pack(samples, 16_384).num_tokens == 54_926
    rows = pack(samples, 16_384, aligned=False)
    # Two of fifty completions may begin with the same one of 50,000 tokens.
    assert 54_870 <= rows.num_tokens <= 54_880 and len(rows) == 4


@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_moved_in_one_copy(sharing, monkeypatch):
    samples = [Sample([1, 2, i % 2], [3] * i, rollout_logprob=[-0.5] * i) for i in range(5)]
    batch = pack(samples, 20, **sharing)
    copies = []
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: copies.append(a) or real(*a, **k))
    there = batch.to("meta")
    monkeypatch.undo()
    assert len(copies) == 1
    for name in ("tokens", "target", "cu_seqlens", "last", "rollout_logprob", "loss_mask"):
        moved, own = getattr(there, name), getattr(batch, name)
        assert moved.is_meta and moved.shape == own.shape and moved.dtype == own.dtype
    assert there.old_logprob is None and not there.bounds.is_meta
    assert batch.to("cpu") is batch
    assert [row.num_tokens for row in there] == [row.num_tokens for row in batch]


def test_a_plan_is_one_rows():
    batch = pack([Sample([1] * 5, [i] * 3) for i in range(7)], 12)
    with pytest.raises(ValueError, match=r"plan of \d rows: take one"):
        _ = batch.plan
    row = batch.row(0)
    assert row.plan.num_tokens == row.num_tokens and row.plan is row.plan
    assert math.isfinite(row.plan.max_length)
