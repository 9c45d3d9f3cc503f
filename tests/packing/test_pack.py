import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.packing import Sample, pack

NAN = math.nan
FIELDS = ("old_logprob", "ref_logprob", "rollout_logprob")


@st.composite
def samples(draw, max_length=12):
    out, token = [], 0
    for _ in range(draw(st.integers(0, 12))):
        p = draw(st.integers(1, max_length - 1))
        c = draw(st.integers(0, max_length - p))
        ids = list(range(token, token + p + c))  # every token is unique, so it can be followed
        token += p + c
        fields = {f: [float(-t) for t in ids[p:]] if draw(st.booleans()) else None for f in FIELDS}
        mask = draw(st.none() | st.lists(st.booleans(), min_size=c, max_size=c))
        advantage = draw(st.sampled_from([-1.5, 0.0, 2.0]))
        if draw(st.booleans()):
            advantage = [advantage + j for j in range(c)]
        out.append(Sample(ids[:p], ids[p:], mask=mask, advantage=advantage, weight=p, **fields))
    return out


@settings(deadline=None)
@given(samples(), st.integers(12, 40))
def test_every_token_once_in_order_within_capacity(batch, capacity):
    packed = pack(batch, capacity)
    total = sum(len(s.prompt) + len(s.completion) for s in batch)
    assert packed.num_tokens == total == packed.cu_seqlens[-1]
    assert sorted(packed.tokens.tolist()) == list(range(total))
    assert sorted(packed.sequence_ids.tolist()) == list(range(len(batch)))
    for s, i in enumerate(packed.sequence_ids.tolist()):
        start, end = packed.cu_seqlens[s : s + 2].tolist()
        whole = [*batch[i].prompt, *batch[i].completion]
        assert packed.tokens[start:end].tolist() == whole
        assert packed.positions[start:end].tolist() == list(range(len(whole)))
        assert packed.target[start:end].tolist() == [*whole[1:], 0]
        assert packed.group_ids[start:end].eq(s).all()
        assert packed.parent_ids[start:end].eq(s).all()
        assert packed.weights[start:end].eq(batch[i].weight).all()
    assert sum(row.num_tokens for row in packed) == total
    for row in packed:
        assert 0 < row.num_tokens <= capacity
        assert row.cu_seqlens.dtype == torch.int32 and row.cu_seqlens[0] == 0
        assert row.cu_seqlens[-1] == row.num_tokens
        ids = row.sequence_ids.tolist()
        assert ids == sorted(ids)


@settings(deadline=None)
@given(samples(), st.integers(12, 40))
def test_fields_lie_where_their_token_is_predicted(batch, capacity):
    packed = pack(batch, capacity)
    for s, i in enumerate(packed.sequence_ids.tolist()):
        start, end = packed.cu_seqlens[s : s + 2].tolist()
        sample, p, c = batch[i], len(batch[i].prompt), len(batch[i].completion)

        def laid(values, elsewhere, p=p):
            return [elsewhere] * (p - 1) + list(values) + [elsewhere]

        mask = [True] * c if sample.mask is None else sample.mask
        assert packed.loss_mask[start:end].tolist() == laid(mask, False)
        advantage = np.broadcast_to(sample.advantage, (c,))
        assert packed.advantages[start:end].tolist() == laid(advantage, 0.0)
        for field in FIELDS:
            values = getattr(packed, field)
            if all(getattr(x, field) is None for x in batch):
                assert values is None
                continue
            own = getattr(sample, field)
            expected = laid([NAN] * c if own is None else own, NAN)
            np.testing.assert_array_equal(values[start:end].numpy(), np.float32(expected))


@settings(deadline=None)
@given(samples(), st.integers(12, 40))
def test_unpack_is_exact(batch, capacity):
    packed = pack(batch, capacity)
    for sample, values in zip(batch, packed.unpack(packed.target, fill=None), strict=True):
        assert values.tolist() == list(sample.completion)
    filled = packed.unpack(packed.target.float(), fill=-7.0)
    for sample, values in zip(batch, filled, strict=True):
        mask = sample.mask or [True] * len(sample.completion)
        kept = [t if m else -7.0 for t, m in zip(sample.completion, mask, strict=True)]
        assert values.tolist() == kept
    for row in packed:
        for i, values in zip(
            row.sequence_ids.tolist(), row.unpack(row.target, fill=None), strict=True
        ):
            assert values.tolist() == list(batch[i].completion)
    assert all(v.isnan().all() for v in packed.unpack(torch.full((packed.num_tokens,), NAN)))


def test_unpack_refuses():
    packed = pack([Sample([1, 2], [3])], 8)
    with pytest.raises(ValueError, match=r"\[2\]: expected \[3\]"):
        packed.unpack(torch.zeros(2))
    with pytest.raises(ValueError, match=r"fill=nan for torch.int64"):
        packed.unpack(packed.target)


def test_lists_arrays_and_tensors_are_the_same():
    forms = [list, np.array, torch.tensor, lambda x: np.array(x, dtype=np.int32)]
    packs = [
        pack([Sample(f([5, 6]), f([7, 8]), mask=f([1, 0]), old_logprob=f([-1, -2]))], 8)
        for f in forms
    ]
    for other in packs[1:]:
        for name in ("tokens", "target", "loss_mask", "old_logprob"):
            a, b = getattr(packs[0], name), getattr(other, name)
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(9), b.nan_to_num(9))


def test_rows_are_views_with_their_own_boundaries():
    packed = pack([Sample([i] * 5, [i] * 3) for i in range(7)], 20)
    assert len(packed) == 4 and [len(r) for r in packed] == [1] * 4
    row = packed.row(1)
    assert row.cu_seqlens.tolist() == [0, 8, 16] and row.sequence_ids.tolist() == [2, 3]
    assert row.tokens.data_ptr() == packed.tokens[16:].data_ptr()
    assert row.row(0).tokens.equal(row.tokens) and packed.row(-1).sequence_ids.tolist() == [6]
    with pytest.raises(IndexError, match="row 4 of a batch of 4"):
        packed.row(4)
    assert packed.to("cpu").row(1).tokens.equal(row.tokens)
    assert packed.to("meta").tokens.is_meta and not packed.to("meta").sequence_ids.is_meta


def test_deterministic_and_empty():
    batch = [Sample([1] * (1 + i % 5), [2] * (i % 3)) for i in range(40)]
    assert pack(batch, 16).tokens.equal(pack(batch, 16).tokens)
    empty = pack([], 16)
    assert len(empty) == 0 and empty.num_tokens == 0 and empty.unpack(torch.zeros(0)) == []
    assert empty.cu_seqlens.tolist() == [0] and list(empty) == []


GOOD = Sample([1, 2], [3, 4])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample([], [1]), "sample 1: prompt has 0 tokens"),
        (Sample([1, -2], [1]), r"sample 1: prompt\[1\]=-2"),
        (Sample([1], [0, 5, -1]), r"sample 1: completion\[2\]=-1"),
        (Sample([1.0], [1]), "sample 1: prompt of dtype float64"),
        (Sample([True], [1]), "sample 1: prompt of dtype bool"),
        (Sample([[1]], [1]), r"sample 1: prompt of shape \[1, 1\]"),
        (Sample([1], [1, 2], old_logprob=[0.0]), "sample 1: old_logprob has 1 values for 2"),
        (Sample([1], [1], ref_logprob=[]), "sample 1: ref_logprob has 0 values for 1"),
        (Sample([1], [1], rollout_logprob=[0.0, 0.0]), "sample 1: rollout_logprob has 2 values"),
        (Sample([1], [1], mask=[True, True]), "sample 1: mask has 2 values for 1"),
        (Sample([1], [1], advantage=[1.0, 2.0]), "sample 1: advantage has 2 values for 1"),
        (Sample([1], [1], advantage=NAN), "sample 1: advantage=nan"),
        (Sample([1], [], advantage=math.inf), "sample 1: advantage=inf"),
        (Sample([1], [1, 2], advantage=[0.0, -math.inf]), "advantage=-inf at completion token 1"),
        (Sample([1], [1], weight=NAN), "sample 1: weight=nan"),
        (Sample([1] * 9, [1] * 8), r"sample 1: 17 tokens \(9 prompt \+ 8 completion\).*=16"),
    ],
)
def test_bad_samples_are_named(sample, message):
    with pytest.raises(ValueError, match=message):
        pack([GOOD, sample], 16)


def test_bad_calls():
    with pytest.raises(ValueError, match="capacity=0"):
        pack([], 0)
    for cost in (-1.0, NAN):
        with pytest.raises(ValueError, match="segment_cost"):
            pack([GOOD], 16, segment_cost=cost)
