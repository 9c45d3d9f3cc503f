"""Loss, log-probs and every gradient of packed trees equal those of one forward per sample."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from pyrl import LossSpec, PolicyLoss, Sample, linear_policy_loss, pack
from pyrl.models import check_model, load_policy
from pyrl.testing import tiny_model_folder

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},  # shorter than the prefixes: the window counts along a path
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8,
               "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
}  # fmt: skip
SPECS = {
    "dapo": LossSpec.preset("dapo", kl_coef=0.1, entropy_coef=0.01),
    "gspo": LossSpec.preset("gspo"),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            options = {"architecture": name, **ARCHITECTURES[name]}
            made[name] = tiny_model_folder(tmp_path_factory.mktemp(name), **options)
        return made[name]

    return folder


def samples(vocab=320, scale=1):
    """Two prompts of several completions, three levels, a one-token prompt, empty completions."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, vocab, (n * scale,), generator=generator).tolist()  # noqa: E731
    first, second, turn, single = ids(9), ids(13), ids(5), ids(1)[:1]
    found = []
    for prompt, lengths in [
        (first, (4, 0, 7, 1)),
        (second, (6, 3)),
        (first + turn, (5, 2, 0)),  # a conversation that goes on from `first`
        (single, (3, 3, 0)),
        (second, (2,)),
        (first + turn + ids(2), (4, 4)),
    ]:
        for n in lengths:
            c = ids(n)
            noise = torch.randn(3, len(c), generator=generator) * 0.1 - 3
            found.append(
                Sample(prompt, c, *noise.unbind(),
                       advantage=float(torch.randn((), generator=generator)),
                       mask=torch.rand(len(c), generator=generator) < 0.9)
            )  # fmt: skip
    return found


def policy_loss(hidden, head, batch, spec, denominator):
    if spec is None:  # in the model's dtype, float64 too: -sum of advantage * log-prob
        logprob = (hidden @ head.weight.T).log_softmax(-1).gather(-1, batch.target[:, None])[:, 0]
        loss = -(batch.advantages * logprob)[batch.loss_mask].sum() / denominator
        return PolicyLoss(loss, {}, logprob)
    return linear_policy_loss(
        hidden, head.weight, batch.target, batch.advantages,
        dataclasses.replace(spec, softcap=head.softcap, logit_scale=head.logit_scale),
        bias=head.bias, old_logprob=batch.old_logprob,
        ref_logprob=batch.ref_logprob if spec.needs_ref else None, mask=batch.loss_mask,
        cu_seqlens=batch.cu_seqlens, denominator=denominator, backend="torch",
    )  # fmt: skip


def packed(policy, batch, spec, denominator):
    """(loss, log-probs by sample, gradients by name) from one forward a row."""
    policy.model.zero_grad(set_to_none=True)
    loss, logprobs = 0.0, {}
    for row in batch:
        hidden = policy.hidden(row.tokens, row.positions, row.plan)
        out = policy_loss(row.at_targets(hidden), policy.head(), row, spec, denominator)
        out.loss.backward()
        loss += out.loss.item()
        ids = sorted(row.sequence_ids.tolist())
        logprobs |= zip(ids, row.unpack(out.logprob.detach(), 0.0), strict=True)
    return loss, torch.cat([logprobs[i] for i in sorted(logprobs)]), grads(policy.model)


def separate(model, head, batch, spec, denominator):
    """The same from transformers' own forward of each sample, alone."""
    model.zero_grad(set_to_none=True)
    loss, logprobs = 0.0, []
    for sample in batch:
        row = pack([sample], 10_000, share_prefix=False, aligned=False)
        hidden = model.base_model(row.tokens[None], use_cache=False).last_hidden_state[0]
        out = policy_loss(row.at_targets(hidden), head, row, spec, denominator)
        out.loss.backward()
        loss += out.loss.item()
        logprobs += row.unpack(out.logprob.detach(), 0.0)
    return loss, torch.cat(logprobs), grads(model)


def grads(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, theirs, allowed):
    """Each within `allowed` of its norm."""
    (loss, logprobs, gradients), (their_loss, their_logprobs, their_gradients) = ours, theirs
    assert loss == pytest.approx(their_loss, rel=allowed)
    assert (logprobs - their_logprobs).norm() <= allowed * their_logprobs.norm()
    assert gradients.keys() == their_gradients.keys() and len(gradients) > 10
    whole = torch.cat([g.flatten() for g in their_gradients.values()]).norm()
    for key, theirs in their_gradients.items():
        # A bias of keys (qwen2) has gradient zero: softmax ignores a shift of all scores.
        assert (gradients[key] - theirs).norm() <= allowed * theirs.norm() + 1e-7 * whole, key


def denominator(spec, batch):
    if spec.aggregation == "token_mean":
        return float(sum(s.mask.sum() for s in batch))
    return float(len(batch))


def theirs_of(folder, batch, spec, attention="eager", dtype=torch.float32):
    """`separate` by an attention of transformers' own."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
    plain.eval()
    head = load_policy(str(folder)).head()
    head = dataclasses.replace(head, weight=plain.get_output_embeddings().weight)
    return separate(plain, head, batch, spec, denominator(spec or SPECS["dapo"], batch))


@pytest.mark.parametrize("capacity", [30, 1000])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_equals_separate(folders, name, aligned, capacity):
    batch, policy = samples(), load_policy(str(folders(name)))
    for spec in SPECS.values():
        together = pack(batch, capacity, aligned=aligned)
        assert (len(together) > 3) == (capacity == 30)
        assert together.num_tokens < 0.9 * together.sample_tokens
        ours = packed(policy, together, spec, denominator(spec, batch))
        assert_equal(ours, theirs_of(folders(name), batch, spec), 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_checkpointing_changes_nothing(folders, name):
    spec, together = SPECS["dapo"], pack(samples(), 1000, aligned=False)
    plain = packed(load_policy(str(folders(name))), together, spec, 30.0)
    saving = load_policy(str(folders(name)), gradient_checkpointing=True)
    again = packed(saving, together, spec, 30.0)
    assert plain[0] == again[0] and plain[1].equal(again[1])
    assert all(again[2][k].equal(g) for k, g in plain[2].items())


def defective(batch):
    """The first target of a branch predicted from the token that happens to lie before it."""
    index = batch.hidden_index.clone()
    ends = batch.cu_seqlens.tolist()
    prompt_ends = set()
    for s in range(batch.num_sequences):
        if batch.completion_lengths[s] > 1:
            first = ends[s]
            if int(index[first]) in prompt_ends:  # not the first branch of this prompt
                index[first] = index[first + 1] - 1
            prompt_ends.add(int(batch.hidden_index[first]))
    return dataclasses.replace(batch, hidden_index=index)


def test_the_first_token_defect_would_be_seen(folders):
    """A row that predicts later branches' first tokens from the branch before fails the test."""
    batch, spec, policy = samples(), SPECS["dapo"], load_policy(str(folders("llama")))
    together = pack(batch, 1000, aligned=False)
    wrong = defective(together)
    changed = int((wrong.hidden_index != together.hidden_index).sum())
    assert 3 <= changed < len(batch)
    theirs = theirs_of(folders("llama"), batch, spec)
    count = denominator(spec, batch)
    assert_equal(packed(policy, together, spec, count), theirs, 1e-5)
    with pytest.raises(AssertionError):
        assert_equal(packed(policy, wrong, spec, count), theirs, 1e-2)


def test_old_code_cannot_ignore_sharing(folders):
    policy = load_policy(str(folders("llama")))
    row = pack(samples(), 1000).row(0)
    with pytest.raises(ValueError, match="begins with position 0; a branch of a shared prefix"):
        policy.hidden(row.tokens, row.positions, row.cu_seqlens)
    for attention in ("pyrl_varlen", "sdpa"):
        other = load_policy(str(folders("llama")), attention=attention)
        with pytest.raises(ValueError, match=f"attention '{attention}' cannot share prefixes"):
            other.hidden(row.tokens, row.positions, row.plan)
        plain = pack(samples(), 1000, share_prefix=False).row(0)
        flat = other.hidden(plain.tokens, plain.positions, plain.plan)
        ours = policy.hidden(plain.tokens, plain.positions, plain.plan)
        assert (flat - ours).norm() <= 1e-5 * ours.norm()


def test_a_plain_model_can_be_checked(folders):
    """Layers that carry a state along the row are found, though the attention is ours."""
    for name in ("llama", "gemma3_text"):
        model = AutoModelForCausalLM.from_pretrained(
            folders(name), attn_implementation="pyrl_tree"
        ).train()
        check_model(model)
        assert model.training
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, linear_num_value_heads=2, num_experts=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    state = AutoModelForCausalLM.from_config(config, attn_implementation="pyrl_tree")
    with pytest.raises(ValueError, match="does not keep packed sequences apart"):
        check_model(state)


@pytest.mark.slow
def test_smollm2():
    """The real model: exact in float64, and no further from it in float32 than separate samples."""
    from pyrl.models.smollm2 import smollm2_folder

    folder, batch = smollm2_folder(), samples(vocab=49152, scale=2)
    _, logprobs, _ = theirs_of(folder, batch, None)
    split = logprobs.split([len(s.completion) for s in batch])
    noise = torch.Generator().manual_seed(1)
    near = lambda p: p + 0.1 * torch.randn(p.shape, generator=noise)  # noqa: E731
    batch = [
        dataclasses.replace(s, old_logprob=near(p), ref_logprob=near(p))
        for s, p in zip(batch, split, strict=True)
    ]
    together = pack(batch, 90, aligned=False)
    assert len(together) > 1
    policy = load_policy(str(folder))
    ours, theirs = {}, {}
    for name, spec in {"dapo": SPECS["dapo"], "plain": None}.items():
        count = denominator(SPECS["dapo"], batch)
        ours[name] = loss, logprobs, _ = packed(policy, together, spec, count)
        theirs[name] = their_loss, their_logprobs, _ = theirs_of(folder, batch, spec, "sdpa")
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert (logprobs - their_logprobs).norm() <= 1e-5 * their_logprobs.norm()
    policy.model.double()
    truth = theirs_of(folder, batch, None, dtype=torch.float64)
    # Not smaller: transformers' norms and rotary angles are in float32 in every dtype.
    assert_equal(packed(policy, together, None, count), truth, 1e-6)
    # Thirty layers amplify the rounding of float32: single gradients are up to 4e-5 from float64
    # either way, all together 1e-5.
    shared, separate_ = (errors(found["plain"][2], truth[2]) for found in (ours, theirs))
    print(f"gradients, relative error: shared {shared}, separate {separate_}")
    # 1.1: on another processor either rounding may come out a little larger.
    assert shared[0] <= 1e-5 and shared[0] <= 1.1 * separate_[0] and shared[1] <= 1.1 * separate_[1]


def errors(gradients, truth):
    """Relative to float64: of all gradients together, of the worst single one."""
    off = {k: gradients[k].double() - t for k, t in truth.items()}
    whole, norm = (torch.cat([g.flatten() for g in x.values()]).norm() for x in (off, truth))
    return float(whole / norm), max(float(off[k].norm() / t.norm()) for k, t in truth.items())
