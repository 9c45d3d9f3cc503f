"""Packed hidden states and gradients equal per-sequence ones; heads, saving, and refusals."""

import itertools
import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pyrl.models import load_policy
from pyrl.packing import Sample, pack
from pyrl.testing import tiny_config, tiny_model_folder, tiny_tokenizer

ARCHITECTURES = {
    "llama": {},
    "llama-untied": {"architecture": "llama", "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8,
               "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 512},
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Architecture -> its tiny folder, made on first use."""
    made = {}

    def folder(name):
        if name not in made:
            config = {"architecture": name, **ARCHITECTURES[name]}
            made[name] = tiny_model_folder(tmp_path_factory.mktemp(name), **config)
        return made[name]

    return folder


def batch(seed=0, vocab=320, capacity=60):
    """Lengths around the sliding window, an empty completion, a row with one sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(3, vocab, (n,), generator=generator)  # noqa: E731
    sizes = [(3, 9), (1, 1), (20, 40), (5, 0), (1, 0), (7, 12), (2, 4)]
    packed = pack([Sample(ids(p), ids(c)) for p, c in sizes], capacity)
    assert packed.num_tokens > 64 and 1 in {row.num_sequences for row in packed}
    return packed


def packed_hidden(policy, batch):
    return torch.cat([policy.hidden(r.tokens, r.positions, r.cu_seqlens) for r in batch])


def separate_hidden(model, batch):
    """transformers' own forward, one sequence at a time, eager attention."""
    outs = []
    for a, b in itertools.pairwise(batch.cu_seqlens.tolist()):
        outs.append(model.base_model(batch.tokens[None, a:b], use_cache=False).last_hidden_state[0])
    return torch.cat(outs)


def relative(a, b):
    return float((a.double() - b.double()).norm().detach() / b.double().norm().detach())


def gradients(hidden, model, seed=1):
    """Of a fixed random functional of the hidden states (the head is tested on its own)."""
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
    model.zero_grad(set_to_none=True)
    (hidden * direction.to(hidden.dtype)).sum().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_separate(folders, name):
    packed = batch()
    policy = load_policy(folders(name))
    plain = AutoModelForCausalLM.from_pretrained(folders(name), attn_implementation="eager").eval()
    ours, theirs = packed_hidden(policy, packed), separate_hidden(plain, packed)
    assert relative(ours, theirs) <= 1e-5
    a, b = gradients(ours, policy.model), gradients(theirs, plain)
    assert a.keys() == b.keys() and len(a) > 10
    whole = torch.cat([g.flatten() for g in b.values()]).norm()
    for key in b:
        # A bias of keys (qwen2, gpt2) has gradient zero: softmax ignores a shift of all scores.
        assert (a[key] - b[key]).norm() <= 1e-5 * b[key].norm() + 1e-7 * whole, key


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_checkpointing_changes_nothing(folders, name):
    packed = batch()
    plain = load_policy(folders(name))
    saving = load_policy(folders(name), gradient_checkpointing=True)
    layers = [m for m in saving.model.modules() if hasattr(m, "gradient_checkpointing")]
    assert any(m.gradient_checkpointing for m in layers)
    calls = []
    layer = saving.model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    ours, theirs = packed_hidden(saving, packed), packed_hidden(plain, packed)
    assert ours.equal(theirs)
    a, b = gradients(ours, saving.model), gradients(theirs, plain.model)
    assert all(a[k].equal(b[k]) for k in b)
    assert len(calls) == 2 * len(packed)  # it did recompute
    assert not saving.model.training


def test_no_square_mask_is_built(folders, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a [T, T] mask was built")

    policy = load_policy(folders("gemma3_text"))
    for name in ("sdpa_mask", "eager_mask"):
        monkeypatch.setattr(transformers.masking_utils, name, forbidden)
    monkeypatch.setattr("pyrl.packing.attention.sdpa_mask", forbidden)
    for row in batch():
        policy.hidden(row.tokens, row.positions, row.cu_seqlens)
    with pytest.raises(AssertionError, match="was built"):
        policy.model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attentions_agree(folders, attention):
    row = batch().row(0)
    args = row.tokens, row.positions, row.cu_seqlens
    expected = load_policy(folders("llama")).hidden(*args)
    assert (
        relative(load_policy(folders("llama"), attention=attention).hidden(*args), expected) < 1e-5
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_generates_with_a_cache_and_padding(folders, name):
    policy = load_policy(folders(name))
    plain = AutoModelForCausalLM.from_pretrained(folders(name), attn_implementation="eager").eval()
    ids = torch.randint(3, 320, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    a = policy.model.generate(ids, attention_mask=mask, **options)
    assert a.equal(plain.generate(ids, attention_mask=mask, **options)) and a.shape == (2, 23)


def test_packed_positions_without_boundaries_are_refused(folders):
    row = batch().row(1)
    policy = load_policy(folders("llama"))
    assert row.num_sequences > 1
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        policy.model(row.tokens[None], position_ids=row.positions[None], use_cache=False)
    out = policy.model(
        row.tokens[None], position_ids=row.positions[None], cu_seq_lens_q=row.cu_seqlens
    )
    hidden = policy.hidden(row.tokens, row.positions, row.cu_seqlens)
    torch.testing.assert_close(out.logits[0], hidden @ policy.head().weight.T)


def test_heads(folders):
    def head(name):
        return load_policy(folders(name)).head()

    assert (head("gemma2").softcap, head("gemma2").logit_scale) == (2.0, 1.0)
    assert (head("granite").softcap, head("granite").logit_scale) == (None, 0.25)
    assert head("cohere").logit_scale == 0.25
    for name, tied in (("llama", True), ("llama-untied", False)):
        policy = load_policy(folders(name))
        weight = policy.head().weight
        assert (weight is policy.model.get_input_embeddings().weight) == tied
        assert isinstance(weight, torch.nn.Parameter) and weight.shape == (320, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folders, dtype):
    row = batch().row(0)
    policy = load_policy(folders("llama"), dtype=dtype)
    assert policy.dtype == dtype
    assert all(p.dtype == dtype for p in policy.model.parameters())
    exact = load_policy(folders("llama"))
    with torch.no_grad():
        for p, q in zip(exact.model.parameters(), policy.model.parameters(), strict=True):
            p.copy_(q)
    hidden = policy.hidden(row.tokens, row.positions, row.cu_seqlens)
    # Two layers of about ten roundings each, at half a unit in the last place.
    unit = torch.finfo(dtype).eps / 2
    expected = exact.hidden(row.tokens, row.positions, row.cu_seqlens)
    assert hidden.dtype == dtype and relative(hidden, expected) <= 8 * unit


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gemma2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saves_a_plain_folder(folders, name, dtype, tmp_path):
    policy = load_policy(folders(name))
    policy.save(tmp_path / "out", dtype=dtype)
    assert "pyrl" not in (tmp_path / "out" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == (dtype or torch.float32)
    own = policy.model.state_dict()
    for key, value in again.state_dict().items():
        assert value.equal(own[key].to(value.dtype)), key
    text = "one <|im_end|> 2 + 3"
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded(text).input_ids == policy.tokenizer(text).input_ids
    message = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(message, tokenize=False).startswith("<|im_start|>user\nhi")
    tied = own.keys() - {"lm_head.weight"} if name != "llama-untied" else own.keys()
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tied)
    assert own["lm_head.weight"].dtype == torch.float32


def test_saving_replaces_or_leaves(folders, tmp_path, monkeypatch):
    policy = load_policy(folders("llama"))
    out = tmp_path / "out"
    policy.save(out)
    (out / "stale").touch()
    policy.save(out)
    assert not (out / "stale").exists()
    before = sorted(p.name for p in out.iterdir())

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(policy.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        policy.save(out)
    assert sorted(p.name for p in out.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing half-made is left


def test_longrope_does_not_reach_other_sequences(folders, tmp_path):
    """Beyond the original context one long sequence changes the frequencies of its whole row."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
               "original_max_position_embeddings": 16, "rope_theta": 1e4}  # fmt: skip
    folder = tmp_path / "phi3"
    shutil.copytree(folders("phi3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_parameters": scaling, "original_max_position_embeddings": 16}
    (folder / "config.json").write_text(json.dumps(config))
    policy = load_policy(str(folder))
    tokens, positions = torch.arange(22) + 3, torch.cat([torch.arange(17), torch.arange(5)])
    bounds = torch.tensor([0, 17, 22], dtype=torch.int32)
    with pytest.raises(ValueError, match="beyond 16 tokens longrope would change"):
        policy.hidden(tokens, positions, bounds)
    assert policy.hidden(tokens[:17], positions[:17], bounds[:2]).shape == (17, 32)


def test_bad_calls(folders):
    policy = load_policy(folders("llama"))
    cu = lambda *ends: torch.tensor(ends, dtype=torch.int32)  # noqa: E731
    tokens, positions = torch.zeros(4, dtype=torch.long), torch.arange(4)
    with pytest.raises(ValueError, match=r"tokens \[1, 4\]"):
        policy.hidden(tokens[None], positions, cu(0, 4))
    with pytest.raises(ValueError, match=r"cu_seqlens\[-1\]=3"):
        policy.hidden(tokens, positions, cu(0, 3))
    with pytest.raises(ValueError, match=r"tokens\[2\]=320: the vocabulary has 320"):
        policy.hidden(torch.tensor([0, 1, 320, 2]), positions, cu(0, 4))
    long = torch.zeros(600, dtype=torch.long)
    with pytest.raises(ValueError, match=r"sequence has 596 tokens; .* holds 512"):
        policy.hidden(long, torch.cat([torch.arange(4), torch.arange(596)]), cu(0, 4, 600))
    assert policy.hidden(tokens[:0], positions[:0], cu(0)).shape == (0, 32)
    assert policy.max_length == 512


def test_missing_and_broken_folders(folders, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_policy(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"no config.json"):
        load_policy(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(folders("llama"), broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_policy(str(broken))
    with pytest.raises(ValueError, match=r"dtype=torch.int8"):
        load_policy(folders("llama"), dtype=torch.int8)


def test_missing_weights_are_not_invented(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders("llama"), tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys.*layers.1.mlp.up_proj"):
        load_policy(str(tmp_path / "m"))


def test_quantized_is_refused(folders, tmp_path):
    shutil.copytree(folders("llama"), tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized"):
        load_policy(str(tmp_path / "q"))


REFUSED = {
    "mamba": ({"state_size": 8}, "linear_attention"),
    "llama4_text": ({"intermediate_size_mlp": 64, "num_local_experts": 2}, "chunked_attention"),
    "rwkv": ({"attention_hidden_size": 32, "context_length": 512}, "no attention functions"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
    "recurrent_gemma": ({"lru_width": 32, "attention_window_size": 64}, "apart|packed rows"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_packed_is_refused(architecture, tmp_path):
    extra, message = REFUSED[architecture]
    config = tiny_config(architecture, **extra)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_policy(str(tmp_path))


def test_a_head_with_more_than_head_says_is_refused(folders, tmp_path, monkeypatch):
    forward = transformers.LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 1.01
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", doubled)
    with pytest.raises(ValueError, match="log-probs would be wrong"):
        load_policy(folders("llama"))


def test_dropout_is_off(folders):
    policy = load_policy(folders("gpt2"))
    drops = [m.p for m in policy.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops and set(drops) == {0.0}


def test_loading_is_quiet(folders, capfd):
    transformers.utils.logging.enable_progress_bar()
    load_policy(folders("llama"))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("attention", [None, "foo"])
def test_an_unknown_attention_is_refused(folders, attention):
    with pytest.raises(
        ValueError, match=rf"attention={attention!r}: expected one of \['pyrl_tree'"
    ):
        load_policy(folders("llama"), attention=attention)
