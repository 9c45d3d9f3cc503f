"""Gradient accumulation and the number of ranks never change the gradient, given `denominator`."""

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl import LossSpec, reduce_metrics
from pyrl.ops.spec import METRICS
from pyrl.parity import MARGIN, relative, serving

D, V = 5, 11

#: Every objective, ratio level, aggregation and correction level once, with KL and entropy.
SPECS = [
    LossSpec.preset("grpo", kl_coef=0.1, entropy_coef=0.1),
    LossSpec.preset("dapo", dual_clip=2.0, delta=1.5),
    LossSpec.preset("dr_grpo", max_length=7, kl="k1", kl_coef=0.2),
    LossSpec.preset("reinforce", aggregation="sequence_sum", entropy_coef=0.1),
    LossSpec.preset("gspo", clip_low=0.1, clip_high=0.2, kl_coef=0.1, kl_ratio_weighted=True),
    LossSpec.preset("gspo_token", clip_low=0.1, clip_high=0.2, aggregation="token_mean"),
    LossSpec.preset("cispo", correction="tis"),
    LossSpec.preset("sapo", kl="k2", kl_coef=0.2, correction="mis", correction_level="sequence"),
    LossSpec.preset("gmpo", correction="icepop", correction_level="geometric", correction_low=0.5),
    LossSpec.preset("vespo", aggregation="sequence_sum"),
    LossSpec.preset("dppo", aggregation="weighted", off_policy_threshold=0.1),
    LossSpec(aggregation="weighted", kl="abs", kl_coef=0.1),
]
BACKENDS = [b for b in serving(torch.device("cpu")) if b != "triton"]  # interpreted: too slow here


def batch(seed, lengths, spec):
    """Flat fields of all sequences, the leaves, and the denominator of the whole batch."""
    g, total = torch.Generator().manual_seed(seed), sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    hidden, weight = normal(total, D), normal(V, D)
    target = torch.randint(0, V, (total,), generator=g)
    now = pyrl.linear_logprob(hidden, weight, target, backend="reference").logprob
    fields = {
        "hidden": hidden,
        "target": target,
        "old_logprob": now + 0.3 * normal(total),
        "ref_logprob": now + 0.3 * normal(total),
        "rollout_logprob": now + 0.3 * normal(total),
        "mask": torch.rand(total, generator=g) > 0.2,
        "weights": torch.rand(total, generator=g),
        # Per token: per sequence, a part with as many tokens as sequences would read as per token.
        "advantages": normal(len(lengths)).repeat_interleave(torch.tensor(lengths)),
    }
    tokens = float(fields["mask"].sum())
    if spec.aggregation == "weighted":
        tokens = float(fields["weights"].double()[fields["mask"]].sum())
    per_token = spec.aggregation in ("token_mean", "weighted")
    return fields, weight, tokens if per_token else len(lengths)


def step(case, backend, micro_batches):
    """Summed loss, dweight, dhidden of the whole batch, and metrics, over these micro-batches."""
    seed, lengths, number = case
    spec = SPECS[number]
    fields, weight, denominator = batch(seed, lengths, spec)
    weight.requires_grad_()
    whole_hidden = fields["hidden"].requires_grad_()
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    loss, metrics = torch.zeros(()), []
    for sequences in micro_batches:
        spans = [torch.arange(bounds[s], bounds[s + 1]) for s in sequences]
        rows = torch.cat([torch.zeros(0, dtype=torch.long), *spans])
        part = {k: v[rows] for k, v in fields.items()}
        counts = torch.tensor([0] + [lengths[s] for s in sequences])
        out = pyrl.linear_policy_loss(
            part.pop("hidden"), weight, part.pop("target"), part.pop("advantages"), spec,
            cu_seqlens=counts.cumsum(0), denominator=denominator, backend=backend, **part,
        )  # fmt: skip
        out.loss.backward()
        loss += out.loss.detach()
        metrics.append(out.metrics)
    zero = torch.zeros(())
    grads = [zero if v.grad is None else v.grad for v in (weight, whole_hidden)]
    shapes = (weight, whole_hidden)
    grads = [g.expand(v.shape).clone() for g, v in zip(grads, shapes, strict=True)]
    return [loss, *grads], metrics


def step_of_rank(rank, case, backend, micro_batches):
    """This rank's micro-batches, then what a trainer does: sum over the ranks."""
    values, metrics = step(case, backend, micro_batches[rank])
    for value in values:
        dist.all_reduce(value)
    return values, metrics


def size_of_terms(seed, lengths, number):
    """sum_t weight_t |A_t|: the policy loss is a sum of such terms of either sign."""
    spec = LossSpec(
        objective="reinforce",
        aggregation=SPECS[number].aggregation,
        max_length=SPECS[number].max_length,
    )
    fields, _, denominator = batch(seed, lengths, spec)
    return pyrl.policy_objective(
        -torch.ones(sum(lengths)), fields["advantages"].abs(), spec, mask=fields["mask"],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), weights=fields["weights"],
        denominator=denominator,
    ).loss  # fmt: skip


@st.composite
def splits(draw):
    """A batch, and its sequences dealt to 1 to 3 micro-batches on each of 2 ranks."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=7))
    counts = [draw(st.integers(1, 3)) for _ in range(2)]
    slots = [(rank, micro) for rank in range(2) for micro in range(counts[rank])]
    dealt = [draw(st.sampled_from(slots)) for _ in lengths]
    micro_batches = [[[] for _ in range(counts[rank])] for rank in range(2)]
    for sequence, (rank, micro) in enumerate(dealt):
        micro_batches[rank][micro].append(sequence)
    case = (draw(st.integers(0, 999)), lengths, draw(st.integers(0, len(SPECS) - 1)))
    return case, draw(st.sampled_from(BACKENDS)), micro_batches


@settings(max_examples=240, deadline=None)
@given(split=splits())
def test_any_split_has_the_gradient_of_the_whole(ranks, split):
    case, backend, micro_batches = split
    everything = [list(range(len(case[1])))]
    exact, exact_metrics = step(case, "reference", everything)
    usual, _ = step(case, "torch", everything)
    terms = size_of_terms(*case)
    (ours, first), (same, second) = ranks(2).run(step_of_rank, case, backend, micro_batches)
    for name, size, a, b, c, d in zip(
        ("loss", "dweight", "dhidden"), (terms, 0, 0), ours, usual, exact, same, strict=True
    ):
        assert relative(a, c, size) <= relative(b, c, size) + MARGIN[torch.float32], name
        assert torch.equal(a, d)
    merged = reduce_metrics(first + second)
    counts = {"tokens", "sequences", "zero_advantage", "clip_low", "clip_high", "nan_old"}
    assert merged.keys() == exact_metrics[0].keys() == {*METRICS, "sequences"}
    for name, value in merged.items():
        # Sums of fp32 log-probs and of their exponentials; counts and extremes are no sums.
        tolerance = 0 if name in counts else 1e-4 * (1 + float(merged["tokens"]))
        whole = float(exact_metrics[0][name])
        assert float(value) == whole or abs(float(value) - whole) <= tolerance, name
