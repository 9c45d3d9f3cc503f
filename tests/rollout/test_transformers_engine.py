"""The embedded engine against plain forwards of transformers, one sequence at a time."""

import math
import threading

import numpy as np
import pytest
import torch

from pyrl.rollout import Rollout, RolloutError, SamplingParams, check_options, make_rollout
from pyrl.rollout import sampling as S
from pyrl.rollout import transformers_engine as E

STOPS = (5, 17, 80, 81, 82, 83, 84, 85)


def ragged(lengths, vocab=320, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in lengths]


@torch.no_grad()
def plain_logits(policy, prompt, completion):
    """[len(completion), V] by one forward of transformers' own eager attention."""
    model, config = policy.model, policy.model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        out = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits
    finally:
        config._attn_implementation = before
    return out[0, len(prompt) - 1 : -1].float()


def plain_logprobs(policy, prompt, completion, temperature=1.0):
    logits = plain_logits(policy, prompt, completion) / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


ARCHITECTURES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 7}),
    ("gemma2", {"sliding_window": 7}),
    ("gemma3_text", {"sliding_window": 7}),
    ("smollm3", {}),
]


@pytest.mark.parametrize(
    ("architecture", "config"), ARCHITECTURES, ids=lambda v: v if isinstance(v, str) else str(v)
)
def test_logprobs_equal_a_plain_forward_for_ragged_prompts(tiny_policy, architecture, config):
    policy = tiny_policy(architecture, **config)
    engine = make_rollout(policy=policy)
    prompts = ragged((1, 9, 3, 20, 3, 14))
    prompts.append(prompts[1])  # a repeated prompt shares its prefill, not its noise
    params = SamplingParams(n=3, max_new_tokens=40, temperature=0.7, stop_token_ids=STOPS)
    groups = engine.generate(prompts, params, seed=3)
    assert [len(group) for group in groups] == [3] * len(prompts)
    assert groups[1] != groups[-1]
    lengths = {len(c.tokens) for group in groups for c in group}
    assert len(lengths) > 3, "the case is meant to drop rows at many different steps"
    for prompt, group in zip(prompts, groups, strict=True):
        for c in group:
            expected = plain_logprobs(policy, prompt, c.tokens, 0.7)
            # fp32; temperature 0.7 and two layers amplify 1e-7 roundings by about 10.
            assert (expected - torch.tensor(c.logprobs)).abs().max() <= 1e-5
            scored = torch.tensor(engine.score(prompt, c.tokens))
            assert (plain_logprobs(policy, prompt, c.tokens) - scored).abs().max() <= 1e-5


def test_the_drawn_tokens_are_those_of_the_naive_loop(tiny_policy):
    """Token by token with full forwards and the same noise: the same tokens."""
    policy = tiny_policy()
    prompts = ragged((4, 11, 2))
    params = SamplingParams(n=2, max_new_tokens=12, temperature=1.3, top_p=0.8, top_k=40)
    groups = make_rollout(policy=policy).generate(prompts, params, seed=5)
    for i, prompt in enumerate(prompts):
        for j, completion in enumerate(groups[i]):
            noise, tokens = torch.from_numpy(S.uniforms(5, i, j, 12)), []
            for t in range(12):
                logits = plain_logits(policy, prompt, [*tokens, 0])[-1:]
                token, logp = S.sample(logits, noise[t : t + 1], params)
                tokens.append(int(token))
                assert abs(float(logp) - completion.logprobs[t]) <= 1e-5
            assert tokens == completion.tokens


def test_the_first_token_is_distributed_as_the_model_says(tiny_policy):
    policy, draws = tiny_policy(), 4000
    [prompt] = ragged((6,))
    params = SamplingParams(n=draws, max_new_tokens=1, top_k=8, temperature=0.8)
    [group] = make_rollout(policy=policy).generate([prompt], params, seed=0)
    logits = plain_logits(policy, prompt, [0])[0] / 0.8
    best = logits.topk(8)
    p = best.values.softmax(-1)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=320)
    assert int(counts.sum()) == int(counts[best.indices].sum()) == draws
    gap = (counts[best.indices] - draws * p).abs()
    assert (gap <= 5 * (draws * p * (1 - p)).sqrt()).all()


def test_same_seed_same_output_whatever_the_batch(tiny_policy):
    policy = tiny_policy()
    prompts = ragged((5, 30, 1, 12))
    params = SamplingParams(n=3, max_new_tokens=20, stop_token_ids=STOPS)
    engine = make_rollout(policy=policy)
    first = engine.generate(prompts, params, seed=9)
    assert engine.generate(prompts, params, seed=9) == first
    assert engine.generate(prompts, params, seed=10) != first
    tokens = [[c.tokens for c in group] for group in first]
    for options in (
        {"max_rows": 2},
        {"max_rows": 5, "prefill_tokens": 8},
        {"max_rows": 1},
        {"workers": 1},
        {"workers": 3},
        {"workers": 50},
        {"workers": 2, "max_rows": 7},
    ):
        other = make_rollout(policy=policy, **options).generate(prompts, params, seed=9)
        assert [[c.tokens for c in group] for group in other] == tokens, options
    # A longer limit continues the same completions, and fewer samples are the first ones.
    params = SamplingParams(n=2, max_new_tokens=25, stop_token_ids=STOPS)
    for group, longer in zip(tokens, engine.generate(prompts, params, seed=9), strict=True):
        assert [c.tokens[:20] for c in longer] == group[:2]


def test_every_prompt_has_its_count(tiny_policy):
    engine = make_rollout(policy=tiny_policy(), workers=1)
    prompts = ragged((5, 30, 1, 12))
    params = SamplingParams(n=3, max_new_tokens=20, stop_token_ids=STOPS)
    plain = engine.generate(prompts, params, seed=9)
    assert engine.generate(prompts, params, seed=9, counts=[3] * 4) == plain, "bit for bit"
    groups = engine.generate(prompts, params, seed=9, counts=np.array([1, 0, 5, 2]))
    assert [len(group) for group in groups] == [1, 0, 5, 2]
    for whole, group in zip(plain, groups, strict=True):
        assert [c.tokens for c in group[:3]] == [c.tokens for c in whole[: len(group)]]
    assert engine.generate(prompts, params, seed=9, counts=[0] * 4) == [[]] * 4
    assert engine.generate([], params, seed=9, counts=[]) == []
    with pytest.raises(ValueError, match="counts: 3 numbers for 4 prompts"):
        engine.generate(prompts, params, seed=9, counts=[1] * 3)
    for bad, shown in ((-1, "-1"), (1.0, "1.0"), (True, "True")):
        with pytest.raises(ValueError, match=rf"counts\[2\]={shown}: expected an integer >= 0"):
            engine.generate(prompts, params, seed=9, counts=[1, 1, bad, 1])


def test_workers_share_the_rows_and_leave_torch_as_it_was(tiny_policy):
    engine = make_rollout(policy=tiny_policy(), workers=2)
    rows = [E._Row(i, j) for i in range(5) for j in range(4)]
    # Cut at a prompt's boundary: 8 and 12 are as even as 4-sample prompts allow.
    assert [len(part) for part in engine._parts(rows)] == [8, 12]
    assert [len(part) for part in engine._parts(rows[:4])] == [2, 2], "one prompt is split"
    assert [row for part in engine._parts(rows) for row in part] == rows
    torch.set_num_threads(2)
    engine.generate(ragged((4, 5)), SamplingParams(n=2, max_new_tokens=3), seed=0)
    assert torch.get_num_threads() == 2
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2], "threads made later must not inherit a worker's share"


def test_a_failing_worker_fails_the_call(tiny_policy):
    engine = make_rollout(policy=tiny_policy(), workers=2)
    with pytest.raises(IndexError):
        engine.generate([*ragged((4, 5)), [100_000]], SamplingParams(n=2), seed=0)
    assert engine.policy.model.config._attn_implementation == "pyrl_tree"


def test_stop_tokens_end_a_completion_and_are_part_of_it(tiny_policy):
    engine = make_rollout(policy=tiny_policy())
    prompts = ragged((3, 8))
    free = engine.generate(prompts, SamplingParams(n=4, max_new_tokens=30), seed=2)
    stop = free[0][0].tokens[4]
    params = SamplingParams(n=4, max_new_tokens=30, stop_token_ids=(stop,))
    stopped = engine.generate(prompts, params, seed=2)
    assert stopped[0][0].finish_reason == "stop"
    for before, after in zip(free, stopped, strict=True):
        for a, b in zip(before, after, strict=True):
            end = a.tokens.index(stop) + 1 if stop in a.tokens else 30
            assert b.tokens == a.tokens[:end]
            assert b.finish_reason == ("stop" if stop in a.tokens else "length")
            assert len(b.logprobs) == end


def test_work_stops_with_the_last_row(tiny_policy, monkeypatch):
    """Early exit: with every token a stop token, only prompts are ever computed."""
    policy = tiny_policy()
    seen = []
    hidden = E.TransformersEngine._hidden
    monkeypatch.setattr(
        E.TransformersEngine,
        "_hidden",
        lambda self, tokens, *rest: (seen.append(tokens.numel()), hidden(self, tokens, *rest))[1],
    )
    prompts = ragged((7, 4, 7))
    prompts[2] = prompts[0]
    params = SamplingParams(n=5, max_new_tokens=50, stop_token_ids=tuple(range(320)))
    groups = make_rollout(policy=policy, workers=1).generate(prompts, params, seed=0)
    assert seen == [11], "one prefill of the two distinct prompts"
    assert all(len(c.tokens) == 1 for group in groups for c in group)
    seen.clear()
    params = SamplingParams(n=5, max_new_tokens=60, stop_token_ids=STOPS)
    groups = make_rollout(policy=policy, workers=1).generate(prompts, params, seed=0)
    sampled = sum(len(c.tokens) for group in groups for c in group)
    # A row's last token is never fed back; finished rows cost nothing.
    assert sum(seen) == 11 + sampled - 15


def test_the_trainers_attention_and_modes_are_untouched(tiny_policy):
    policy = tiny_policy()
    model = policy.model
    before = model.config._attn_implementation
    modes = [m.training for m in model.modules()]
    engine = make_rollout(policy=policy)
    engine.generate(ragged((3,)), SamplingParams(max_new_tokens=3), seed=0)
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
        engine.generate([[]], SamplingParams(), seed=0)
    assert model.config._attn_implementation == before == "pyrl_tree"
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    tokens = torch.tensor(ragged((6,))[0])
    hidden = policy.hidden(tokens, torch.arange(6), torch.tensor([0, 6], dtype=torch.int32))
    hidden.sum().backward()
    model.zero_grad()


def test_an_error_inside_a_forward_restores_the_attention(tiny_policy, monkeypatch):
    policy = tiny_policy()
    monkeypatch.setattr(E, "sample", lambda *a: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        make_rollout(policy=policy).generate(ragged((3,)), SamplingParams(), seed=0)
    assert policy.model.config._attn_implementation == "pyrl_tree"


def test_prompts_and_context(tiny_policy):
    policy = tiny_policy()
    engine = make_rollout(policy=policy)
    params = SamplingParams(max_new_tokens=8)
    with pytest.raises(ValueError, match=r"prompts\[1\] has 512 tokens; the context holds 512"):
        engine.generate(ragged((3, 512)), params, seed=0)
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
        engine.generate([[], [1]], params, seed=0)
    assert engine.generate([], params, seed=0) == []
    # The context ends one completion after two tokens, not its neighbour.
    [full], [short] = engine.generate(ragged((510, 2)), params, seed=0)
    assert (len(full.tokens), full.finish_reason) == (2, "length")
    assert (len(short.tokens), short.finish_reason) == (8, "length")
    with pytest.raises(ValueError, match="the context holds 512"):
        engine.score([1] * 500, [1] * 13)
    assert engine.score([1], []) == []


def test_weights_are_shared_without_a_copy(tiny_policy):
    policy = tiny_policy()
    engine = make_rollout(policy=policy)
    assert isinstance(engine, Rollout) and engine.shares_weights
    assert (engine.name, engine.dtype, engine.version) == ("transformers", torch.float32, 0)
    prompt, completion = ragged((5, 4))
    weight = policy.model.get_input_embeddings().weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(0.3)
        engine.sync(iter(()), 4)
        assert engine.version == 4
        expected = plain_logprobs(policy, prompt, completion)
        assert (expected - torch.tensor(engine.score(prompt, completion))).abs().max() <= 1e-5
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_an_engine_of_its_own_follows_by_sync(tiny_policy, tmp_path):
    policy = tiny_policy()
    policy.save(tmp_path / "model")
    engine = make_rollout(model_path=str(tmp_path / "model"))
    assert not engine.shares_weights
    prompt, completion = ragged((5, 4))
    with torch.no_grad():
        for p in engine.policy.model.parameters():
            p.mul_(1.5)
    expected = plain_logprobs(policy, prompt, completion)
    assert (expected - torch.tensor(engine.score(prompt, completion))).abs().max() > 1e-2
    engine.sync(policy.model.state_dict().items(), 1)
    assert (expected - torch.tensor(engine.score(prompt, completion))).abs().max() <= 1e-5
    with pytest.raises(RolloutError, match="no weight 'nothing'"):
        engine.sync([("nothing", torch.zeros(1))], 2)


def test_nan_logits_are_an_error_that_names_its_place(tiny_policy, monkeypatch):
    engine = make_rollout(policy=tiny_policy())
    logits = engine._logits
    monkeypatch.setattr(engine, "_logits", lambda hidden: logits(hidden) * math.nan)
    with pytest.raises(RolloutError, match=r"NaN log-prob at token 0 of sample 0 of prompts\[0\]"):
        engine.generate(ragged((3,)), SamplingParams(max_new_tokens=2), seed=0)


def test_unsupported_models_and_options_are_refused(tiny_policy):
    with pytest.raises(ValueError, match="engine='sglang': expected one of transformers, vllm"):
        make_rollout("sglang", policy=tiny_policy())
    with pytest.raises(ValueError, match="give a policy or a model_path"):
        make_rollout()
    with pytest.raises(ValueError, match="max_rows=0"):
        make_rollout(policy=tiny_policy(), max_rows=0)
    with pytest.raises(ValueError, match="max_rows='many': expected >= 1"):
        make_rollout(policy=tiny_policy(), max_rows="many")
    known = r"no option 'max_row' \(did you mean 'max_rows'\?\); its options: max_rows=256, prefill"
    with pytest.raises(ValueError, match=known):
        make_rollout(policy=tiny_policy(), max_row=3)
    with pytest.raises(ValueError, match="'policy' is no option"):
        check_options("vllm", {"policy": 1})
    policy = tiny_policy()
    policy.model.config.layer_types = ["linear_attention", "full_attention"]
    try:
        with pytest.raises(ValueError, match="linear_attention"):
            make_rollout(policy=policy)
    finally:
        del policy.model.config.layer_types


def test_gradient_checkpointing_does_not_disturb_sampling(tmp_path):
    from pyrl.models import load_policy
    from pyrl.testing import tiny_model_folder

    folder = tiny_model_folder(tmp_path)
    prompts, params = ragged((4, 9)), SamplingParams(n=2, max_new_tokens=10)
    plain = make_rollout(policy=load_policy(folder)).generate(prompts, params, seed=1)
    policy = load_policy(folder, gradient_checkpointing=True)
    policy.model.train()  # a trainer may leave it so
    assert make_rollout(policy=policy).generate(prompts, params, seed=1) == plain
    assert policy.model.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(tmp_path, dtype):
    from pyrl.models import load_policy
    from pyrl.testing import tiny_model_folder

    policy = load_policy(tiny_model_folder(tmp_path), dtype=dtype)
    policy.model.to("cuda")
    engine = make_rollout(policy=policy)
    prompts = ragged((1, 9, 30))
    params = SamplingParams(n=4, max_new_tokens=40, top_p=0.95, stop_token_ids=STOPS)
    groups = engine.generate(prompts, params, seed=1)
    assert engine.generate(prompts, params, seed=1) == groups
    greedy = SamplingParams(n=1, max_new_tokens=20, temperature=0)
    # TF32 is off by default; bfloat16 rounds logits of order 10 to 2^-5.
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for prompt, [c] in zip(prompts, engine.generate(prompts, greedy, seed=1), strict=True):
        scored = engine.score(prompt, c.tokens)
        assert max(abs(a - b) for a, b in zip(scored, c.logprobs, strict=True)) <= tolerance


@pytest.mark.parametrize("workers", [1, 2])
def test_each_completion_is_told_when_it_ends(tiny_policy, workers):
    """Once each, the shorter ones first, and what is raised there ends the sampling."""
    policy, prompts = tiny_policy(), ragged((5, 30, 1, 12))
    params = SamplingParams(n=3, max_new_tokens=20, stop_token_ids=STOPS)
    engine = make_rollout(policy=policy, workers=workers)
    told = []
    groups = engine.generate(prompts, params, seed=2, counts=[2, 3, 0, 3],
                             on_completion=lambda *found: told.append(found))  # fmt: skip
    assert groups == engine.generate(prompts, params, seed=2, counts=[2, 3, 0, 3])
    assert sorted(told, key=lambda found: found[:2]) == [
        (i, j, completion) for i, group in enumerate(groups) for j, completion in enumerate(group)
    ]
    if workers == 1:
        lengths = [len(completion.tokens) for _, _, completion in told]
        assert lengths == sorted(lengths) and len(set(lengths)) > 1

    def refuse(*found):
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        engine.generate(prompts, params, seed=2, on_completion=refuse)
