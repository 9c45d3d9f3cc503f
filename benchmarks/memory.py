"""Ways to train in less memory: seconds of an update, its peak memory, and what makes it up.

    python benchmarks/run.py --only memory

SmolLM2-135M, one micro-batch of 8 sequences x 256 tokens (64 of prompt): backbone, clip loss,
backward, AdamW step. Each variant runs in a fresh process, one after the other; `peak` is the
resident memory's high-water mark over the last timed step, the interpreter with torch and
transformers included. `saved` is what the backbone keeps for its backward (parameters
left out), `on the GPU` what of it would stay there with `offload_activations`; both are counted,
and the same on a device that runs the same ops. `a sampled token` is one decode step of 16 rows of
the transformers engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    MIB,
    conditions,
    known_or_raise,
    peak_resident_mib,
    reset_peak,
    run_child,
    trim,
    version_of,
    write_rows,
)

NAME = "memory"
MODEL = "smollm2-135m"
RANK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A row: the keys of [model] that it sets."""

    name: str
    dtype: str = "bfloat16"
    lora_rank: int = 0
    quantize: str = "none"
    gradient_checkpointing: bool = False
    extra: bool = False
    """Only with --all, or by name."""


VARIANTS: tuple[Variant, ...] = (
    Variant(name="all weights", dtype="float32", extra=True),
    Variant(name="all weights"),
    Variant(name="all weights, checkpointing", gradient_checkpointing=True),
    Variant(name=f"LoRA {RANK}", lora_rank=RANK, extra=True),
    Variant(name=f"LoRA {RANK}, checkpointing", lora_rank=RANK, gradient_checkpointing=True,
            extra=True),
    Variant(name=f"LoRA {RANK}, int8", lora_rank=RANK, quantize="int8", extra=True),
    Variant(
        name=f"LoRA {RANK}, int8, checkpointing", lora_rank=RANK, quantize="int8",
        gradient_checkpointing=True,
    ),
)  # fmt: skip


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every variant, written to `out`/memory.jsonl as each one ends. `rounds` counts the
    measured steps."""
    known_or_raise(NAME, names, (v.name for v in VARIANTS))
    sequences, length = (2, 32) if quick else (8, 256)
    run_id = uuid.uuid4().hex[:8]
    rows = []
    for variant in VARIANTS:
        if variant.name not in names if names else variant.extra and not (everything or quick):
            continue
        say(f"memory: {variant.name}, {variant.dtype}, in a fresh process")
        steps = 1 + (rounds or (5 if everything else 1))
        work = {
            "sequences": sequences, "length": length, "steps": steps,
            "threads": torch.get_num_threads(), "sampled": 4 if quick else 16,
        }  # fmt: skip
        row = {
            "op": NAME, "implementation": variant.name, "package": "pyrl",
            "version": version_of("pyrl"), "dtype": variant.dtype, "kept_share": 1.0,
            "shape": [sequences, length], "settings": MODEL, "peft": version_of("peft"),
            "torchao": version_of("torchao"), "run": run_id, **conditions("cpu"),
        }  # fmt: skip
        given = json.dumps({"variant": dataclasses.asdict(variant), "work": work})
        found = run_child("memory.py", "--measure", given, timeout=1500)
        if "error" in found:
            row.update(status="failed", reason=found["error"])
        else:
            row.update(status="ok", **found)
        rows.append(row)
        write_rows(out / f"{NAME}.jsonl", [row])
    return rows


# ---- in the fresh process ----------------------------------------------------------------------


def policy_of(variant: Variant) -> Any:
    from pyrl.models import Adapters, load_policy

    adapters = None
    if variant.lora_rank:
        adapters = Adapters(rank=variant.lora_rank, quantize=variant.quantize)  # type: ignore[arg-type]
    return load_policy(
        MODEL,
        dtype=getattr(torch, variant.dtype),
        gradient_checkpointing=variant.gradient_checkpointing,
        adapters=adapters,
        check=False,
    )


def measure(variant: Variant, work: dict[str, int]) -> dict[str, Any]:
    from pyrl import LossSpec, linear_policy_loss
    from pyrl.models.offload import saved_bytes
    from pyrl.packing import Sample, pack
    from pyrl.trainer.config import OptimizerConfig
    from pyrl.trainer.optimizer import MasterAdamW

    torch.set_num_threads(work["threads"])
    policy = policy_of(variant)
    optimizer = MasterAdamW(policy.model, OptimizerConfig())
    generator = torch.Generator().manual_seed(0)
    count, length = work["sequences"], work["length"]
    ids = torch.randint(10, 40_000, (count, length), generator=generator)
    prompt = length // 4
    samples = [
        Sample(line[:prompt], line[prompt:], advantage=float(i % 2) - 0.5)
        for i, line in enumerate(ids)
    ]
    row = pack(samples, count * length, share_prefix=False)
    spec = LossSpec.preset("grpo")

    def hidden() -> torch.Tensor:
        return policy.hidden(row.tokens, row.positions, row.cu_seqlens)

    def step() -> None:
        head = policy.head()
        out = linear_policy_loss(
            hidden(), head.weight, row.target, row.advantages, spec, bias=head.bias,
            mask=row.loss_mask, cu_seqlens=row.cu_seqlens,
        )  # fmt: skip
        out.loss.backward()
        optimizer.step(1e-6)

    moved, kept = saved_bytes(policy.model, hidden)
    step()  # allocates the moments
    return_freed_memory()
    seconds = []
    for _ in range(work["steps"] - 1):
        trim()
        reset_peak()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    peak = peak_resident_mib()
    parameters = list(policy.model.parameters())
    state = optimizer.state_dict()
    own = {m.data_ptr() for m in parameters if not hasattr(m, "qdata")}
    optimizer_bytes = sum(m.nbytes for m in state["masters"].values() if m.data_ptr() not in own)
    for moments in state["adam"]["state"].values():
        optimizer_bytes += sum(v.nbytes for v in moments.values() if isinstance(v, torch.Tensor))
    found = {
        "seconds": round(statistics.median(seconds), 3),
        "seconds_all": [round(s, 3) for s in seconds],
        "peak_mib": round(peak, 1),
        "weights_mib": round(sum(map(stored_bytes, parameters)) / MIB, 1),
        "optimizer_mib": round(optimizer_bytes / MIB, 1),
        "saved_mib": round((moved + kept) / MIB, 1),
        "saved_offloaded_mib": round(kept / MIB, 1),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "ms_token": round(decode_ms(policy, work["sampled"]), 1),
    }
    if variant.quantize == "int8" and not variant.gradient_checkpointing:  # the same weights
        del optimizer
        found |= logprob_error(policy, variant)
    return found


def return_freed_memory() -> None:
    """From now on glibc maps what is 1 MiB or larger by itself and unmaps it when it is freed. Its
    own choice grows to 32 MiB and leaves holes: two runs then differ by more than int8 saves."""
    m_mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, 1 << 20)


def stored_bytes(parameter: Any) -> int:
    if hasattr(parameter, "qdata"):
        return int(parameter.qdata.nbytes + parameter.scale.nbytes)
    return int(parameter.nbytes)


def decode_ms(policy: Any, tokens: int) -> float:
    """Milliseconds of one token of 16 rows, the prompt's forward included."""
    from pyrl.rollout import SamplingParams, make_rollout

    engine = make_rollout(policy=policy)
    times = []
    for i, new in enumerate((2, tokens)):  # the first warms up
        params = SamplingParams(n=16, max_new_tokens=new)
        began = time.perf_counter()
        engine.generate([list(range(20, 36))], params, seed=i)
        times.append((time.perf_counter() - began) * 1e3 / new)
    return times[-1]


def logprob_error(policy: Any, variant: Variant) -> dict[str, float]:
    """|Δ log-prob| of a text's tokens, quantized against not, both in `variant.dtype`; and of the
    unquantized ones in `variant.dtype` against float32, which is rounding."""
    text = policy.tokenizer.encode((Path(__file__).parents[1] / "README.md").read_text())[:1024]
    plain = dataclasses.replace(variant, quantize="none", lora_rank=0)
    exact = logprobs(policy_of(dataclasses.replace(plain, dtype="float32")), text)
    same = logprobs(policy_of(plain), text)
    ours = logprobs(policy, text)
    return {
        "int8_error_mean": round(float((ours - same).abs().mean()), 5),
        "int8_error_max": round(float((ours - same).abs().max()), 4),
        "rounding_mean": round(float((same - exact).abs().mean()), 5),
        "rounding_max": round(float((same - exact).abs().max()), 4),
    }


@torch.no_grad()
def logprobs(policy: Any, text: Sequence[int]) -> torch.Tensor:
    from pyrl import linear_logprob

    tokens, ends = torch.tensor(text), torch.tensor([0, len(text)], dtype=torch.int32)
    hidden = policy.hidden(tokens, torch.arange(len(text)), ends)[:-1]
    return linear_logprob(hidden, policy.head().weight, tokens[1:]).logprob


# ---- tables ------------------------------------------------------------------------------------

COLUMNS = (
    "trained", "dtype", "s an update", "peak MiB", "weights", "optimizer", "saved", "on the GPU",
    "ms a sampled token",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    head = [row["implementation"], row["dtype"]]
    if row["status"] != "ok":
        return [*head, f"{row['status']}: {row['reason']}", *[""] * (len(COLUMNS) - 3)]
    sizes = ("peak_mib", "weights_mib", "optimizer_mib", "saved_mib", "saved_offloaded_mib")
    return [
        *head, f"{row['seconds']:.2f}", *(f"{row[key]:.0f}" for key in sizes),
        f"{row['ms_token']:.0f}",
    ]  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> None:
    from table import print_cells

    print_cells("an update, MiB", COLUMNS, [cells(row) for row in rows], 2)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    from table import conditions_text, markdown_cells

    parts = []
    for sequences, length in sorted({tuple(r["shape"]) for r in rows}, reverse=True):
        members = [r for r in rows if r["shape"] == [sequences, length]]
        parts += [
            f"### An update of {MODEL} on {sequences} sequences x {length} tokens, sizes in MiB",
            "",
            *markdown_cells(COLUMNS, [cells(row) for row in members]),
            "",
            "peak: resident memory over an update, the interpreter included; saved: what the "
            "backbone keeps for its backward; on the GPU: what of it stays there with "
            "offload_activations; a sampled token: 16 rows, transformers engine.",
            "",
        ]
        parts += [
            f"int8 against unquantized log-probs ({r['dtype']}, 1024 tokens of a text): mean "
            f"{r['int8_error_mean']:.4f}, max {r['int8_error_max']:.2f}; {r['dtype']} against "
            f"float32: mean {r['rounding_mean']:.4f}, max {r['rounding_max']:.2f}.\n"
            for r in members
            if r.get("int8_error_mean") is not None and "checkpointing" not in r["implementation"]
        ]
        parts += [conditions_text(members), ""]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2 or arguments[0] != "--measure":
        raise SystemExit("usage: memory.py --measure JSON")
    given = json.loads(arguments[1])
    print(json.dumps(measure(Variant(**given["variant"]), given["work"])))


if __name__ == "__main__":
    main(sys.argv[1:])
