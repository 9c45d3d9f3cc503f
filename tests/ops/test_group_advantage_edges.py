"""group_advantage where it is hard: ties, large means, lost rewards, filters, sizes, bad input."""

import pytest
import torch

import pyrl
from pyrl.ops.group_advantage import FILTERS, METHODS, METRICS
from pyrl.parity import DEVICE, MARGIN, relative, serving

NAN = float("nan")
BATCH_METHODS = ("batch_std", "whiten", "whiten_baseline")


@pytest.mark.parametrize("backend", serving())
def test_equal_rewards_give_exactly_zero(backend):
    # The mean of seven times 0.1 is not 0.1 in floating point: eps = 0 would make it anything.
    # 130 are more than Triton's tile holds.
    ids = torch.tensor([0] * 2 + [1] * 7 + [2] * 130, device=DEVICE)
    for value in (0.1, 0.7, 1e6 + 0.1):
        for method in ("grpo", "mean", "rloo", *BATCH_METHODS):
            rewards = torch.full((139,), value, device=DEVICE)
            out = pyrl.group_advantage(rewards, ids, method=method, eps=0.0, backend=backend)
            assert not out.advantages.any(), (value, method)
    # A batch of equal singletons: each group's mean is 0, the batch still tells nothing apart.
    alone = torch.full((5,), 0.1, device=DEVICE)
    for method in BATCH_METHODS:
        out = pyrl.group_advantage(
            alone, torch.arange(5, device=DEVICE), method=method, eps=0.0, backend=backend
        )
        assert not out.advantages.any()
    # One equal group beside another: the deviations of the others must not leak into it.
    rewards = torch.tensor([0.1] * 7 + [0.3, 0.9, 0.4], device=DEVICE)
    ids = torch.tensor([0] * 7 + [1] * 3, device=DEVICE)
    for method in ("batch_std", "whiten_baseline"):
        out = pyrl.group_advantage(rewards, ids, method=method, backend=backend)
        assert not out.advantages[:7].any() and out.advantages[7:].all()


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("raw", "positive", "correct", "scaled")]
)
def test_a_large_mean_costs_no_digits(backend, method):
    g = torch.Generator().manual_seed(0)
    # Multiples of 2^-10: adding 2^20 is exact in float64, so both advantages are the same number.
    small = (torch.randint(-4096, 4096, (600,), generator=g) / 1024).double().to(DEVICE)
    ids = torch.randint(90, (600,), generator=g).to(DEVICE)
    ids[ids.bincount()[ids] == 1] = 0  # a group of one keeps its mean
    near = pyrl.group_advantage(small, ids, method=method, backend="reference")
    far = pyrl.group_advantage(small + 2.0**20, ids, method=method, backend=backend)
    assert relative(far.advantages, near.advantages) < MARGIN[torch.float32]


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("method", METHODS)
def test_nan_rewards_are_as_if_absent(backend, method):
    g = torch.Generator().manual_seed(1)
    rewards, ids = torch.randn(60, generator=g), torch.randint(9, (60,), generator=g)
    rewards[ids == 4] = NAN  # a whole group
    lost = torch.rand(60, generator=g) < 0.3
    rewards[lost] = NAN
    rewards, ids, scored = rewards.to(DEVICE), ids.to(DEVICE), ~rewards.isnan().to(DEVICE)
    out = pyrl.group_advantage(rewards, ids, method=method, backend=backend)
    without = pyrl.group_advantage(rewards[scored], ids[scored], method=method, backend=backend)
    torch.testing.assert_close(out.advantages[scored], without.advantages, rtol=1e-6, atol=1e-7)
    assert not out.advantages[~scored].any() and torch.equal(out.keep, scored)
    assert out.metrics["nan_rewards"] == (~scored).sum()
    assert out.metrics["reward_sum"] == without.metrics["reward_sum"]


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("method", METHODS)
def test_nothing_scored(backend, method):
    for n in (0, 1, 3):
        rewards = torch.full((n,), NAN, device=DEVICE)
        ids = torch.zeros(n, dtype=torch.int64, device=DEVICE)
        out = pyrl.group_advantage(rewards, ids, method=method, eps=0.0, backend=backend)
        assert out.advantages.tolist() == [0.0] * n and not out.keep.any()
        assert out.metrics["nan_rewards"] == n and out.metrics["kept"] == 0
        assert out.metrics["groups"] == min(n, 1) and out.metrics["zero_std_groups"] == 0


@pytest.mark.parametrize("backend", serving())
def test_a_batch_of_one_has_mean_0_and_std_1(backend):
    reward, one = torch.tensor([3.0], device=DEVICE), torch.zeros(1, dtype=int, device=DEVICE)
    expected = (2.0, 3.0, 0.0, 1.0, 3.0, 2.0, 2.0, 2.0, 1.0, 2.0)
    for method, value in zip(METHODS, expected, strict=True):
        out = pyrl.group_advantage(reward, one, method=method, eps=0.5, backend=backend)
        assert out.advantages.tolist() == [value], method


@pytest.mark.parametrize("backend", serving())
def test_filters(backend):
    rewards = torch.tensor([1.0, 1, 0, 0, 1, 0, 0.5, 0.5], device=DEVICE)
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3], device=DEVICE)
    cases = {
        "drop_all_correct": [0, 1, 6, 7],
        "drop_all_wrong": [2, 3],
        "drop_zero_std": [0, 1, 2, 3, 6, 7],
        ("drop_all_correct", "drop_all_wrong"): [0, 1, 2, 3, 6, 7],
    }
    for filters, gone in cases.items():
        expected = torch.ones(8, dtype=torch.bool)
        expected[gone] = False
        drop = pyrl.group_advantage(
            rewards, ids, method="raw", filter=filters, filter_mode="drop", backend=backend
        )
        assert drop.keep.cpu().equal(expected) and drop.metrics["kept"] == 8 - len(gone)
        zero = pyrl.group_advantage(rewards, ids, method="raw", filter=filters, backend=backend)
        assert zero.keep.all() and not zero.advantages.cpu()[gone].any()
        assert zero.metrics["filtered"] == len(gone) and zero.metrics["kept"] == 8
        # Of all rewards as given, whatever is filtered or mapped.
        assert zero.metrics["reward_sum"] == 4 and zero.metrics["reward_sq_sum"] == 3.5


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("method", BATCH_METHODS)
def test_dropped_groups_leave_the_batch_and_zeroed_ones_stay(backend, method):
    g = torch.Generator().manual_seed(5)
    rewards, ids = torch.randn(40, generator=g), torch.arange(40) // 5
    rewards[:10] += 9  # two groups all correct
    rewards, ids = rewards.to(DEVICE), ids.to(DEVICE)
    call = {"method": method, "filter": "drop_all_correct", "backend": backend}
    rest = pyrl.group_advantage(rewards[10:], ids[10:], method=method, backend=backend)
    plain = pyrl.group_advantage(rewards, ids, method=method, backend=backend)
    drop = pyrl.group_advantage(rewards, ids, filter_mode="drop", **call)
    zero = pyrl.group_advantage(rewards, ids, **call)
    torch.testing.assert_close(drop.advantages[10:], rest.advantages, rtol=1e-6, atol=1e-7)
    assert torch.equal(zero.advantages[10:], plain.advantages[10:])
    assert not drop.advantages[:10].any() and not zero.advantages[:10].any()


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("method", METHODS)
def test_reward_map_comes_first_and_filters_read_the_rewards_as_given(backend, method):
    rewards = torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 0], device=DEVICE)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3], device=DEVICE)
    for a, b in ((-1.0, 1.0), (3.0, 0.5)):
        mapped = pyrl.group_advantage(
            rewards, ids, method=method, reward_map=(a, b), backend=backend
        )
        by_hand = pyrl.group_advantage(a + (b - a) * rewards, ids, method=method, backend=backend)
        torch.testing.assert_close(mapped.advantages, by_hand.advantages, rtol=1e-6, atol=1e-7)
    # Mapped to (3, 0.5) every reward is > 0; as given the groups 1 and 2 are all correct.
    out = pyrl.group_advantage(
        rewards, ids, reward_map=(3.0, 0.5), method=method, filter="drop_all_correct",
        filter_mode="drop", backend=backend,
    )  # fmt: skip
    assert out.keep.tolist() == [True] * 4 + [False] * 3 + [True]


@pytest.mark.parametrize("backend", [b for b in serving() if b != "triton"])
def test_many_rewards_and_uneven_groups(backend):
    """2^18 rewards: 128 blocks of 1024 groups in C++, whose sums merge; one group of 2^16. (Under
    Triton's interpreter minutes; its tiles are crossed in tests/kernels.)"""
    g = torch.Generator().manual_seed(0)
    n = 1 << 18
    rewards = torch.rand(n, generator=g).to(DEVICE)
    ids = torch.randint(n // 2, (n,), generator=g).to(DEVICE)
    ids[: n // 4] = -1
    for method in ("grpo", "whiten_baseline"):
        out = pyrl.group_advantage(rewards, ids, method=method, backend=backend)
        r, index = rewards.double(), ids + 1
        size = index.bincount()
        mean = torch.zeros_like(size, dtype=torch.float64).index_add(0, index, r) / size
        x = torch.where(size[index] > 1, r - mean[index], r)
        squares = torch.zeros_like(mean).index_add(0, index, x * x)
        std = torch.where(size > 1, (squares / (size - 1)).sqrt(), 1.0)[index]
        if method == "whiten_baseline":
            x, std = x - x.mean(), x.std()
        assert relative(out.advantages, x / (std + 1e-6)) < MARGIN[torch.float32]
        again = pyrl.group_advantage(rewards, ids, method=method, backend=backend)
        assert torch.equal(again.advantages, out.advantages)
        assert again.metrics == out.metrics and out.metrics["groups"] == (size > 0).sum()


def test_the_bits_do_not_depend_on_the_threads():
    g = torch.Generator().manual_seed(0)
    rewards, ids = torch.randn(1 << 16, generator=g), torch.randint(9999, (1 << 16,), generator=g)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(pyrl.group_advantage(rewards, ids, method="whiten"))
    finally:
        torch.set_num_threads(threads)
    one, two = results
    assert torch.equal(one.advantages, two.advantages) and one.metrics == two.metrics


def test_the_torch_backend_never_asks_for_a_value():
    """A fake tensor has none: whoever asks raises. (The call itself: one graph, below.)"""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pyrl.ops.backends.torch import group_advantage_terms

    with FakeTensorMode():
        rewards = torch.empty(64, dtype=torch.float64)
        order, offsets = torch.empty(64, dtype=torch.int64), torch.empty(9, dtype=torch.int64)
        for method in range(len(METHODS)):
            terms = group_advantage_terms(
                rewards, order, offsets, method, True, 1e-6, 7, True, -1.0, 2.0
            )
            assert [t.shape[0] for t in terms] == [64, 64, len(METRICS)]


@pytest.mark.parametrize("backend", serving())
def test_one_graph_under_compile(backend):
    """Nothing in the call reads a value, sorting and offsets included: it would break the graph."""
    rewards = torch.tensor([2.0, 0.0, 0.5, 1.0, 1.0, 0.25], device=DEVICE)
    ids = torch.tensor([2, 0, 1, 0, 0, 1], device=DEVICE)
    offsets = torch.tensor([0, 2, 2, 6], device=DEVICE)

    def call(r, i, o):
        options = {"method": "whiten", "filter": FILTERS, "backend": backend}
        by_ids = pyrl.group_advantage(r, i, **options)
        return by_ids, pyrl.group_advantage(r, group_offsets=o, **options)

    expected = call(rewards, ids, offsets)
    compiled = torch.compile(call, fullgraph=True, backend="eager")(rewards, ids, offsets)
    for a, b in zip(compiled, expected, strict=True):
        assert torch.equal(a.advantages, b.advantages) and a.metrics == b.metrics


@pytest.mark.parametrize("backend", [*serving(), "reference"])
def test_opcheck(backend):
    from pyrl.ops.group_advantage import _group_advantage

    rewards = torch.rand(5, device=DEVICE, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 5, 5, 5, 5], device=DEVICE)
    for order in (None, torch.arange(5, device=DEVICE).flip(0)):
        for method in (0, METHODS.index("whiten")):
            torch.library.opcheck(
                _group_advantage,
                (rewards, order, offsets, method, True, 1e-6, 4, True, -1.0, 2.0, backend),
            )


def test_bad_input_names_itself():
    r, ids = torch.rand(4, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)

    def refuses(match, rewards=r, groups=ids, **options):
        with pytest.raises(ValueError, match=match):
            pyrl.group_advantage(rewards, groups, **options)

    refuses("method='std'", method="std")
    refuses("filter='all'", filter="all")
    refuses("filter_mode='mask'", filter_mode="mask")
    refuses("eps=-1", eps=-1)
    refuses(r"reward_map=\(1, 1\)", reward_map=(1, 1))
    refuses("reward_map=", reward_map=(0.0, NAN))
    refuses("group_ids: expected integers", groups=ids[:2])
    refuses("group_ids: expected integers, got torch.float32", groups=r)
    refuses("rewards: expected floating", rewards=ids)
    refuses("either group_ids or group_offsets", group_offsets=ids)
    refuses("either group_ids or group_offsets", groups=None)
    refuses(r"group_offsets: expected integers \[G \+ 1\]", groups=None, group_offsets=ids[:0])
    if DEVICE.type == "cpu":
        for offsets, match in (
            ([0, 3], r"run from 0 to n=4, got 0 … 3"),
            ([1, 4], r"run from 0 to n=4, got 1 … 4"),
            ([0, 3, 2, 4], "group_offsets falls at 2: 3 → 2"),
        ):
            refuses(match, groups=None, group_offsets=torch.tensor(offsets))
        r[2] = torch.inf
        refuses(r"rewards\[2\] = inf")
