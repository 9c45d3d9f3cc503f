"""What `pack` takes and what it refuses, by the sample, the field, the position and the value."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyrl.packing import Sample, pack

NAN, INF = math.nan, math.inf
GOOD = Sample([1, 2], [3, 4])
LOGPROBS = ("old_logprob", "ref_logprob", "rollout_logprob")


def refused(message, **fields):
    sample = Sample(**{"prompt": [1], "completion": [1, 2], **fields})
    with pytest.raises(ValueError, match=message):
        pack([GOOD, sample], 16)


@pytest.mark.parametrize("field", ["prompt", "completion"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([5, 2**63], dtype=np.uint64), r"\[1\]=9223372036854775808, .* < 2\^63"),
        (torch.tensor([5, 2**63], dtype=torch.uint64), r"\[1\]=9223372036854775808"),
        ([5, 2**63], r"\[1\]=9223372036854775808"),  # float64 to NumPy
        ([5, 6, 2**64], r"\[2\]=18446744073709551616"),  # objects to NumPy
        ([2**64, -1], r"\[0\]=18446744073709551616"),
        ([5, -(2**70)], r"\[1\]=-1180591620717411303424"),
        ([torch.tensor(5), torch.tensor(-3)], r"\[1\]=-3"),
        ([5, None], " of dtype object, expected integer"),
        (["5"], " of dtype <U1, expected integer"),
        ([[1], [2, 3]], " cannot be read as an array"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), " cannot be read as an array"),
        (None, r" of shape \[\]"),
    ],
    ids=str,
)
def test_token_ids(field, ids, message):
    refused(f"sample 1: {field}{message}", **{field: ids})


def test_the_largest_token_ids_are_kept():
    for ids in ([2**63 - 1], np.array([2**63 - 1], dtype=np.uint64)):
        assert pack([Sample(ids, ids)], 4).tokens.tolist() == [2**63 - 1] * 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0.0, 1.0], r"mask\[0\]=0.0, expected True, False, 1 or 0"),
        ([True, 0.5], r"mask\[1\]=0.5"),
        (np.array([1.0, 0.0]), r"mask\[0\]=1.0"),
        (torch.tensor([0.0, 1.0], dtype=torch.bfloat16), r"mask\[0\]=0.0"),
        ([True, "False"], r"mask\[1\]='False'"),
        ([1, 2], r"mask\[1\]=2"),
        (torch.tensor([2, 3]), r"mask\[0\]=2"),
        (np.array([0, -1], dtype=np.int8), r"mask\[1\]=-1"),
        ([True, None], r"mask\[1\]=None"),
        ([1j, True], r"mask\[0\]=1j"),
        (True, r"mask of shape \[\]"),
    ],
    ids=str,
)
def test_masks(mask, message):
    refused(f"sample 1: {message}", mask=mask)


@pytest.mark.parametrize(
    "mask",
    [
        [True, False],
        (1, 0),
        np.array([1, 0], dtype=np.uint8),
        torch.tensor([True, False]),
        np.array([True, False], dtype=object),
        [np.True_, 0],
    ],
    ids=repr,
)
def test_masks_of_booleans_and_bits(mask):
    batch = pack([Sample([1], [2, 3], mask=mask)], 4)
    assert batch.loss_mask.tolist() == [True, False, False]
    assert pack([Sample([1], [], mask=[])], 4).loss_mask.tolist() == [False]


@pytest.mark.parametrize("field", LOGPROBS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-1.0, INF], r"\[1\]=inf"),
        ([1e39, -1.0], r"\[0\]=inf in float32"),
        (torch.tensor([-1.0, INF], dtype=torch.bfloat16), r"\[1\]=inf"),
        (["a", "b"], " of dtype <U1, expected numbers"),
        ([None, "a"], r"\[1\]='a', expected a number"),
        ([None, 10**400], r"\[1\]=10{400}, expected a number"),
        ([-1j, 0], " of dtype complex128"),
        (torch.tensor([-1j, 0]), " of dtype complex64"),
        (0.0, r" of shape \[\]"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_logprobs(field, values, message):
    refused(f"sample 1: {field}{message}", **{field: values})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("field", LOGPROBS)
def test_logprobs_that_are_kept(field):
    values = [NAN, -INF, -1e39, 1e-6, None, Fraction(-1, 2)]
    batch = pack([Sample([1], [2] * 6, **{field: values})], 8)
    expected = np.float32([NAN, -INF, -INF, 1e-6, NAN, -0.5, NAN])
    np.testing.assert_array_equal(getattr(batch, field).numpy(), expected)


@pytest.mark.parametrize("field", [*LOGPROBS, "advantage"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_every_float(field, dtype):
    values = torch.tensor([-0.3, -1.7], dtype=dtype, requires_grad=True)
    batch = pack([Sample([1], [2, 3], **{field: values})], 4)
    laid = getattr(batch, "advantages" if field == "advantage" else field)
    assert laid.dtype == torch.float32 and not laid.requires_grad
    assert laid[:2].equal(values.detach().float())


def test_numbers_of_every_kind():
    for one in (1, 1.0, np.float16(1), torch.tensor(1.0, dtype=torch.bfloat16), np.array(1)):
        batch = pack([Sample([1], [2], advantage=one, weight=one)], 4)
        assert batch.advantages.tolist() == [1, 0] and batch.weights.tolist() == [1, 1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("field", ["weight", "advantage"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "None, expected a finite number"),
        ("a", "'a', expected"),
        ("1", "'1', expected"),
        (1j, "1j, expected"),
        (10**400, "10{400}, expected"),
        (1e39, r"1e\+39, not finite in float32"),
        (-INF, "-inf, not finite"),
        (torch.tensor(NAN, dtype=torch.bfloat16), "nan, not finite"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_numbers(field, value, message):
    refused(f"sample 1: {field}={message}", **{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": [1.0]}, r"weight=\[1.0\], expected a finite number"),
        ({"advantage": [0.0, 1e39]}, "advantage=inf at completion token 1, not finite"),
        ({"advantage": [0.0, None]}, "advantage=nan at completion token 1, not finite"),
        ({"advantage": ["a", "b"]}, "advantage of dtype <U1, expected numbers"),
        ({"advantage": [[1.0], [2.0, 3.0]]}, "advantage cannot be read as an array"),
    ],
    ids=str,
)
def test_weights_and_advantages_per_token(fields, message):
    refused(f"sample 1: {message}", **fields)


@pytest.mark.parametrize("samples", [[], [GOOD]], ids=["empty", "one"])
@pytest.mark.parametrize("capacity", [0, -1, INF, NAN, "9", None, 2.5, 2**63, 10**400, [9]])
def test_capacities(capacity, samples):
    with pytest.raises(ValueError, match=r"capacity=.*: expected a whole number of tokens >= 1"):
        pack(samples, capacity)


@pytest.mark.parametrize("capacity", [9, np.int32(9), 9.0, 2**63 - 1])
def test_whole_capacities(capacity):
    assert type(pack([GOOD], capacity).capacity) is int


@pytest.mark.parametrize("cost", ["x", None, -1.0, INF, NAN, 10**400, 1j])
def test_segment_costs(cost):
    with pytest.raises(ValueError, match=r"segment_cost=.*: expected a finite number >= 0"):
        pack([GOOD], 16, segment_cost=cost)
    with pytest.raises(ValueError, match=r"area_cost=.*: expected a finite number >= 0"):
        pack([GOOD], 16, area_cost=cost)


def test_samples_of_any_iterable():
    batch = pack((Sample([1, 2], [i], weight=i) for i in range(3)), 4)
    assert batch.tokens.equal(pack([Sample([1, 2], [i]) for i in range(3)], 4).tokens)
    assert batch.weights.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_hidden_states_of_several_rows():
    samples = [Sample([1] * 3, [i] * 3) for i in range(3)]
    batch = pack(samples, 6, aligned=False)
    with pytest.raises(ValueError, match=r"hidden states of 3 rows: take one of `row\(i\)`"):
        batch.at_targets(batch.tokens)
    gathered = [row.at_targets(row.tokens).tolist() for row in batch]
    assert gathered == [[1, i, i] for i in range(3)]
    aligned = pack(samples, 6)
    assert aligned.at_targets(aligned.tokens) is aligned.tokens
    empty = pack([], 6, aligned=False)
    assert empty.at_targets(empty.tokens).tolist() == []
