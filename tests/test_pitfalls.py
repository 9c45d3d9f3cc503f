"""One named test for every pitfall of other RL losses that these must be immune to."""

# Pitfall or complaint, and its tests; those without a file are here or in test_pitfalls_head.py.
#
# Masked positions multiplied instead of selected; -inf * 0
#     test_masked_positions_select_and_never_multiply
# -inf logits
#     test_infinite_logits_of_banned_tokens
# All-masked batch is NaN
#     test_an_all_masked_batch_has_loss_0_and_gradient_0
# V divisible by no tile, V > 2^17, T = 0, T = 1, empty completion, L >= 65536
#     test_awkward_shapes
#     kernels/test_logits.py::test_rows_are_on_grid_axis_0
# Padded vocabulary
#     ops/test_heads.py::test_a_padded_vocabulary_is_neither_read_nor_trained
# T V > 2^31
#     ops/test_logits_logprob.py::test_rows_beyond_two_to_the_31
#     kernels/test_logits.py::test_offsets_beyond_2_to_the_31
#     native/test_cuda.py::test_a_matrix_of_more_than_two_billion_logits
# Sequence ratio over masked tokens; GSPO with a stopped gradient
#     test_the_sequence_ratio_counts_kept_tokens_only
#     test_gspo_is_not_gspo_token_under_per_token_advantages
# k1 has no gradient in expectation, k3's is not the reverse KL's
#     test_what_the_kl_estimators_estimate
# CISPO's bound on the ratio; delta is not dual clip
#     test_cispo_bounds_the_ratio_and_delta_is_not_dual_clip
# bf16-rounded logits; bf16 sums of dW over chunks
#     losses/test_linear_policy_loss.py::test_parity
#     test_a_bf16_weight_gradient_is_summed_in_fp32
# Ties at clip edges
#     test_ties_at_the_clip_edges_have_torchs_subgradients
# Asked for one loss, trained another
#     test_what_a_backend_cannot_do_is_an_error_and_not_another_loss
#     test_adding_a_loss.py::test_kernels_without_the_loss_refuse_it_by_name
# A target lost at a chunk's edge
#     test_chunks_do_not_shift_or_lose_targets
# Entropy bonus is a no-op; entropy under no_grad
#     test_the_entropy_bonus_has_a_gradient
#     test_entropy_without_a_bonus_is_reported_and_trains_nothing
# Gradients g/4 or x100; divided twice by accumulation steps; normaliser of one rank
#     test_accumulation_needs_no_division
#     distributed/test_invariance.py::test_any_split_has_the_gradient_of_the_whole
# Truncated completions in the denominator
#     test_truncated_completions_stay_in_no_denominator_but_their_own
# MoE auxiliary loss dropped
#     integrations/test_trl.py::test_equals_trl_on_other_heads
# No packed input; padded compute
#     ops/test_policy_objective.py::test_any_batch
#     losses/test_logits_policy_loss.py::test_unkept_rows_are_not_read
# Out of memory at the logits
#     losses/test_linear_policy_loss.py::test_no_tensor_has_tokens_by_vocabulary
# ZeRO-3 or FSDP head size mismatch
#     distributed/test_full_weight.py::test_fsdp2_has_the_gradients_of_one_process
#     distributed/test_full_weight.py::test_a_zero3_parameter_is_whole_inside_the_block
# LoRA on the head refused
#     ops/test_heads.py::test_lora_equals_the_merged_weight
# top-p bias
#     losses/test_support_replay.py::test_ratio_of_an_unchanged_policy
# Temperature missing
#     test_the_temperature_reaches_log_probs_entropy_and_gradient
# NaN rewards poison a group; standard deviation of one
#     ops/test_group_advantage_edges.py::test_nan_rewards_are_as_if_absent
#     ops/test_group_advantage.py::test_closed_forms
# "The loss is 0, is it broken?"
#     test_a_loss_of_0_says_why
# A placeholder log-prob poisons the batch
#     test_a_huge_ratio_poisons_no_other_token
# A broken model trains on
#     test_a_nan_log_prob_is_seen
#     test_a_nan_hidden_state_is_seen
# f16 gradients underflow under loss scaling
#     test_f16_gradients_survive_a_large_denominator_under_loss_scaling
# A second derivative that is silently 0
#     test_a_second_derivative_is_refused_and_not_0
# Dtypes, strides, autocast
#     test_a_float64_or_integer_head_is_refused
#     test_targets_of_any_integer_dtype_and_stride
#     test_autocast_does_not_reach_into_the_ops

import re
from pathlib import Path

import pytest
import torch

import pyrl
from pyrl import LossSpec
from pyrl.certify.cases import OBJECTIVES
from pyrl.parity import DEVICE, relative, serving

backends = pytest.mark.parametrize("backend", serving())


HEAD = "test_pitfalls_head.py"


def test_every_pitfall_names_a_test_that_is_there():
    folder, here = Path(__file__).parent, Path(__file__).name
    table = "\n".join(x for x in Path(__file__).read_text().splitlines() if x.startswith("#     "))
    defined = {
        file: set(re.findall(r"^def (test_\w+)", (folder / file).read_text(), re.M))
        for file in {here, HEAD, *re.findall(r"([\w/]+\.py)::", table)}
    }
    named = re.findall(r"(?:([\w/]+\.py)::)?(test_\w+)$", table, re.M)
    assert len(named) == len(table.splitlines())
    mine = defined[here] | defined[HEAD]
    for file, name in named:
        assert name in (defined[file] if file else mine), (file, name)
    assert mine - {name for _, name in named} == {"test_every_pitfall_names_a_test_that_is_there"}


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


@backends
def test_the_sequence_ratio_counts_kept_tokens_only(backend):
    # Two kept tokens with log-ratios 0.2 and 0.4; the masked ones must not pull the mean.
    logprob = torch.tensor([-1.0, -2.0, -3.0, -4.0], device=DEVICE)
    shift = torch.tensor([0.2, 9.0, 0.4, -9.0], device=DEVICE)
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    spec = LossSpec(ratio_level="sequence", clip_high=5.0)
    out = pyrl.policy_objective(
        logprob, torch.ones(1, device=DEVICE), spec, old_logprob=logprob - shift, mask=mask,
        cu_seqlens=torch.tensor([0, 4], device=DEVICE), backend=backend,
    )  # fmt: skip
    assert out.metrics["ratio_max"].item() == pytest.approx(torch.tensor(0.3).exp().item(), 1e-6)


@backends
def test_gspo_is_not_gspo_token_under_per_token_advantages(backend):
    old, advantages = (torch.linspace(a, 1, 16, device=DEVICE) for a in (-3, -1))
    logprob = (old + 0.1).requires_grad_()
    bounds = torch.tensor([0, 6, 6, 7, 16], device=DEVICE)
    found = {}
    for level in ("sequence", "sequence_token"):
        spec = LossSpec(ratio_level=level, clip_high=5.0)
        out = pyrl.policy_objective(
            logprob, advantages, spec, old_logprob=old, cu_seqlens=bounds, backend=backend
        )  # fmt: skip
        found[level] = (out.loss.item(), gradient(out.loss, logprob))
    assert found["sequence"][0] == pytest.approx(found["sequence_token"][0], rel=1e-6)
    assert relative(found["sequence"][1], found["sequence_token"][1]) > 0.1


def test_what_the_kl_estimators_estimate():
    """Expectations over the whole vocabulary: k1's gradient vanishes, k2's is the reverse KL's,
    k3's is another divergence's; their values are KL, nearly KL, KL."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.randn(50, generator=g, dtype=torch.float64).log_softmax(0)
    logp = z.log_softmax(0)
    p = logp.detach().exp()
    kl = (logp.exp() * (logp - ref)).sum()
    (true,) = torch.autograd.grad(kl, z, retain_graph=True)

    def expected(kind):
        from pyrl.ops.objective import kl_term

        value = (p * kl_term(logp, ref, kind)).sum()
        return value.detach(), torch.autograd.grad(value, z, retain_graph=True)[0]

    assert expected("k1")[0].allclose(kl) and expected("k3")[0].allclose(kl)
    assert expected("k1")[1].norm() < 1e-12
    assert expected("k2")[1].allclose(true)
    assert expected("k3_st")[1].allclose(true) and expected("k3_st")[0].allclose(kl)
    assert relative(expected("k3")[1], true) > 0.1
    for word in ("k1\n    has zero expected gradient", "not the reverse KL's"):
        assert word in Path(pyrl.ops.spec.__file__).read_text()


@backends
def test_cispo_bounds_the_ratio_and_delta_is_not_dual_clip(backend):
    logprob = torch.zeros(1, device=DEVICE).requires_grad_()
    old = -torch.tensor([3.0], device=DEVICE).log()  # ratio 3

    def loss(advantage, **spec):
        a = torch.tensor([advantage], device=DEVICE)
        out = pyrl.policy_objective(
            logprob - 1, a, LossSpec(**spec), old_logprob=old - 1, backend=backend
        )
        return out.loss.item(), gradient(out.loss, logprob).item()

    assert loss(1.0, objective="cispo", cispo_high=2.0) == pytest.approx((2.0, -2.0))
    assert loss(-1.0) == pytest.approx((3.0, 3.0))  # the pessimistic side is unbounded
    assert loss(-1.0, delta=2.5) == pytest.approx((2.5, 0.0))
    assert loss(-1.0, dual_clip=2.0) == pytest.approx((2.0, 0.0))
    assert loss(1.0, delta=2.5) == loss(1.0)  # and the clipped branch knows no delta


@backends
def test_ties_at_the_clip_edges_have_torchs_subgradients(backend):
    ratio = torch.tensor([0.75, 1.25, 1.0, 2.0, 0.75, 1.25], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0], device=DEVICE)
    spec = LossSpec(clip_low=0.25, clip_high=0.25, dual_clip=2.0)
    found = []
    for name in (backend, "reference"):
        logprob = torch.zeros(6, device=DEVICE).requires_grad_()
        out = pyrl.policy_objective(
            logprob, advantages, spec, old_logprob=-ratio.log().float().to(DEVICE), backend=name
        )
        found.append(gradient(out.loss, logprob))
    assert relative(found[0], found[1]) < 1e-6


def test_what_a_backend_cannot_do_is_an_error_and_not_another_loss():
    with pytest.raises(ValueError, match="objective='gmp0'"):
        LossSpec(objective="gmp0")
    with pytest.raises(ValueError, match="ratio_level"):
        LossSpec(objective="gmpo", ratio_level="sequence")
    logprob = torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match="rollout_logprob"):
        pyrl.policy_objective(logprob, logprob, LossSpec(correction="tis"))
    with pytest.raises(ValueError, match="cu_seqlens"):
        pyrl.policy_objective(logprob, logprob, LossSpec.preset("gspo"))


@backends
def test_a_loss_of_0_says_why(backend):
    """Zero advantages train nothing and are counted; on-policy a loss of 0 has a gradient."""
    logprob = torch.full((4,), -1.0, device=DEVICE).requires_grad_()
    for advantages, dead in (([0.0] * 4, 4), ([1.0, -1.0, 1.0, -1.0], 0)):
        a = torch.tensor(advantages, device=DEVICE)
        out = pyrl.policy_objective(logprob, a, LossSpec(), backend=backend)
        assert out.loss == 0 and out.metrics["zero_advantage"] == dead
        assert torch.equal(gradient(out.loss, logprob), -a / 4)


@backends
def test_truncated_completions_stay_in_no_denominator_but_their_own(backend):
    """Masking a truncated completion's tokens takes them out of token_mean's N, not out of B."""
    logprob, advantages = -torch.rand(8, device=DEVICE), torch.ones(2, device=DEVICE)
    bounds = torch.tensor([0, 4, 8], device=DEVICE)
    mask = torch.tensor([True] * 4 + [False] * 4, device=DEVICE)
    whole = {"cu_seqlens": bounds, "mask": mask, "backend": backend}
    alone = {"cu_seqlens": bounds[:2], "backend": backend}
    for aggregation, share in (("token_mean", 1.0), ("sequence_mean", 0.5)):
        spec = LossSpec(objective="reinforce", aggregation=aggregation)
        a = pyrl.policy_objective(logprob, advantages, spec, **whole).loss
        b = pyrl.policy_objective(logprob[:4], advantages[:1], spec, **alone).loss
        assert relative(a, share * b) < 1e-6


@backends
def test_a_huge_ratio_poisons_no_other_token(backend):
    """One placeholder log-prob of -9999: a positive advantage clips it, a zero one ignores it."""
    logprob = torch.full((3,), -1.0, device=DEVICE).requires_grad_()
    old = torch.tensor([-9999.0, -9999.0, -1.0], device=DEVICE)
    advantages = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    out = pyrl.policy_objective(logprob, advantages, LossSpec(), old_logprob=old, backend=backend)
    assert out.loss.item() == pytest.approx(-(1.2 + 0 + 1) / 3)
    assert gradient(out.loss, logprob).tolist() == pytest.approx([0.0, 0.0, -1 / 3])


@backends
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_nan_log_prob_is_seen(backend, objective):
    """A broken model must not train on as if nothing were wrong, on-policy neither."""
    logprob = torch.tensor([torch.nan, -1.0], device=DEVICE).requires_grad_()
    one, bounds = torch.ones(2, device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    for old in (None, torch.full_like(one, torch.nan), -one):
        for advantages in (one, -one):
            out = pyrl.policy_objective(
                logprob, advantages, LossSpec(**OBJECTIVES[objective]), old_logprob=old,
                cu_seqlens=bounds, backend=backend,
            )  # fmt: skip
            assert out.loss.isnan()


@backends
def test_a_second_derivative_is_refused_and_not_0(backend):
    if backend == "torch":
        pytest.skip("torch differentiates the formula itself")
    logprob = torch.zeros(3, device=DEVICE).requires_grad_()
    out = pyrl.policy_objective(
        logprob, torch.ones(3, device=DEVICE), LossSpec(), old_logprob=logprob - 0.1,
        backend=backend,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.loss, logprob, create_graph=True)
