"""transformers models on rows with shared prefixes: what each path alone gives, unpatched."""

import itertools

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pyrl.packing.attention import no_mask
from pyrl.packing.tree_attention import TREE_ATTENTION_NAME, TreePlan
from pyrl.parity import MARGIN
from pyrl.testing import tiny_config

WINDOW = {"sliding_window": 6}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma2": {**WINDOW, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 8},
    "phi3": {},
    "phi3 window": {"architecture": "phi3", **WINDOW},
    "granite": {},
    "cohere2": {**WINDOW, "sliding_window_pattern": 2},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 512},
}
# Two prompts and a lone sequence; a one-token prompt; an empty completion; three levels. Paths are
# shorter and longer than the window, and the window ends inside branches, prompts and histories.
SEGMENTS = [(9, -1), (4, 0), (12, 0), (0, 0), (1, -1), (7, 4), (2, 4), (3, 6), (8, 6), (5, -1)]
PLAN = TreePlan.build(
    [0, *itertools.accumulate(n for n, _ in SEGMENTS)], [parent for _, parent in SEGMENTS]
)


def tokens(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (PLAN.num_tokens,), generator=draw)


def model_of(name, attention):
    options = {"architecture": name, **ARCHITECTURES[name]}
    config = tiny_config(**options, attn_implementation=attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def shared_hidden(model, ids):
    """[T, D]: every token once."""
    return model.base_model(
        input_ids=ids[None], position_ids=PLAN.positions[None],
        attention_mask=no_mask(ids.device), tree_plan=PLAN, use_cache=False,
    ).last_hidden_state[0]  # fmt: skip


def paths():
    """The tokens from the root to each leaf."""
    for leaf in set(range(len(PLAN.parents))) - set(PLAN.parents):
        path, g = [], leaf
        while g >= 0:
            path[:0] = range(PLAN.starts[g], PLAN.starts[g + 1])
            g = PLAN.parents[g]
        yield path


def separate_hidden(model, ids):
    """[T, D] of transformers' own eager attention, a path at a time; and (path, its [n, D])."""
    copies, rows = [], {}
    for path in paths():
        hidden = model.base_model(ids[None, path], use_cache=False).last_hidden_state[0]
        copies.append((path, hidden))
        rows.update(zip(path, hidden, strict=True))
    return torch.stack([rows[t] for t in range(PLAN.num_tokens)]), copies


def directions(width, seed=1):
    """[paths, T, D]: another functional of each path, so a prefix sums over its branches."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(len(list(paths())), PLAN.num_tokens, width, generator=draw)


def gradients(loss, model):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_equals_separate(name, checkpointing):
    """Hidden states and every parameter's gradient, of losses that differ in each branch."""
    ids = tokens()
    ours, theirs = model_of(name, TREE_ATTENTION_NAME), model_of(name, "eager")
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train()  # transformers checkpoints in training only; dropout is zero
    shared = shared_hidden(ours, ids)
    separate, copies = separate_hidden(theirs, ids)
    assert relative(shared.detach(), separate.detach()) <= 1e-5
    weights = directions(shared.shape[1])
    a = gradients(
        sum((shared[path] * w[path]).sum() for (path, _), w in zip(copies, weights, strict=True)),
        ours,
    )
    b = gradients(
        sum((hidden * w[path]).sum() for (path, hidden), w in zip(copies, weights, strict=True)),
        theirs,
    )
    assert a.keys() == b.keys() and len(a) > 10
    whole = torch.cat([g.flatten() for g in b.values()]).norm()
    for key in b:
        # A bias of keys (qwen2, gpt2) has gradient zero: softmax ignores a shift of all scores.
        assert (a[key] - b[key]).norm() <= 1e-5 * b[key].norm() + 1e-7 * whole, key


def test_checkpointing_recomputes_with_the_plan():
    model = model_of("llama", TREE_ATTENTION_NAME).train()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    plain = gradients(shared_hidden(model, tokens()).square().sum(), model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    saved = gradients(shared_hidden(model, tokens()).square().sum(), model)
    assert len(calls) == 3 and all(plain[k].equal(saved[k]) for k in plain)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_branch_sees_no_other(name):
    model, ids = model_of(name, TREE_ATTENTION_NAME), tokens()
    with torch.no_grad():
        before = shared_hidden(model, ids)
        inside = slice(PLAN.starts[2], PLAN.starts[3])
        ids[inside] = (ids[inside] - 3 + 11) % 317 + 3
        after = shared_hidden(model, ids)
    changed = (before != after).any(1)
    assert changed[inside].all() and not changed[: inside.start].any()
    assert not changed[inside.stop :].any()


def test_no_square_mask_is_built(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a [T, T] mask was built")

    for name in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(transformers.masking_utils, name, forbidden)
    monkeypatch.setattr("pyrl.packing.attention.sdpa_mask", forbidden)
    model = model_of("gemma3_text", TREE_ATTENTION_NAME)
    shared_hidden(model, tokens())
    with pytest.raises(AssertionError, match="was built"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_generates_with_a_cache_and_padding(name):
    ids = torch.randint(3, 320, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    outs = []
    for attention in (TREE_ATTENTION_NAME, "eager"):
        model = model_of(name, attention)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 2
        outs.append(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12))
    assert outs[0].equal(outs[1]) and outs[0].shape == (2, 23)


def test_packed_positions_without_a_plan_are_refused():
    model = model_of("llama", TREE_ATTENTION_NAME)
    with pytest.raises(ValueError, match="without boundaries"):
        model(tokens()[None], position_ids=PLAN.positions[None], use_cache=False)


def packed_hidden(model, ids):
    """Every path whole, in one row with boundaries: (path, its [n, D])."""
    flat = list(paths())
    lengths = [len(path) for path in flat]
    hidden = model.base_model(
        ids[None, list(itertools.chain(*flat))],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        attention_mask=no_mask(ids.device), use_cache=False,
    ).last_hidden_state[0]  # fmt: skip
    return list(zip(flat, hidden.split(lengths), strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_autocast_over_float32_weights(name):
    """RoPE leaves q and k in float32, v is bfloat16: no less exact than eager, a path at a time.

    Over several rows, because on one the roundings of a tiny model fall out by chance.
    """
    ways = {
        "exact": (model_of(name, "eager").double(), lambda *x: separate_hidden(*x)[1]),
        "alone": (model_of(name, "eager"), lambda *x: separate_hidden(*x)[1]),
        "shared": (
            model_of(name, TREE_ATTENTION_NAME),
            lambda *x: [(path, h[path]) for h in [shared_hidden(*x)] for path in paths()],
        ),
        "packed": (model_of(name, TREE_ATTENTION_NAME), packed_hidden),
    }
    results = {}
    for way, (model, hidden_of) in ways.items():
        rows, grads = [], []
        for seed in range(6):
            with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
                copies = hidden_of(model, tokens(seed))
            weights = directions(32, seed)
            loss = sum((h * w[path]).sum() for (path, h), w in zip(copies, weights, strict=True))
            grads += [g.flatten() for _, g in sorted(gradients(loss, model).items())]
            rows += [h.detach().flatten() for _, h in copies]
        results[way] = torch.cat(rows), torch.cat(grads)
    for way in ("shared", "packed"):
        for at in range(2):
            ours, theirs, exact = (results[key][at] for key in (way, "alone", "exact"))
            assert relative(ours, exact) <= relative(theirs, exact) + MARGIN[torch.bfloat16]


def test_position_ids_must_be_the_plans():
    model, ids = model_of("llama", TREE_ATTENTION_NAME), tokens()

    def call(**given):
        return model.base_model(
            ids[None], attention_mask=no_mask(ids.device), tree_plan=PLAN, use_cache=False, **given
        )

    at = int((PLAN.positions != torch.arange(PLAN.num_tokens)).nonzero()[0])
    message = rf"position_ids\[{at}\]={at}: expected {int(PLAN.positions[at])}, .*tree_plan"
    call(position_ids=PLAN.positions[None])
    with pytest.raises(ValueError, match=message):  # transformers counts along the row
        call()
    wrong = PLAN.positions.clone()
    wrong[-1] += 2
    with pytest.raises(ValueError, match=rf"position_ids\[{PLAN.num_tokens - 1}\]=6: expected 4"):
        call(position_ids=wrong[None])


def test_positions_are_compared_once_a_call(monkeypatch):
    calls, real = [], torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: calls.append(1) or real(x))
    model, ids, positions = model_of("llama", TREE_ATTENTION_NAME), tokens(), PLAN.positions[None]
    given = {"tree_plan": PLAN, "attention_mask": no_mask(ids.device), "use_cache": False}
    for _ in range(2):
        model.base_model(ids[None], position_ids=positions, **given)
    assert len(model.model.layers) == 2 and len(calls) == 1
