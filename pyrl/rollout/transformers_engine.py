"""The embedded engine: the trainer's own transformers module, sampled in process by our own loop.

Why not `generate`: it runs every sample's prompt, keeps finished rows in the batch, rebuilds masks
each token and returns no log-probs of the truncated distribution. Here each distinct prompt is run
once, its keys and values are copied to its samples, finished rows leave the batch, and the head is
applied to last positions only.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .decode_attention import KVCache, decoding, using
from .protocol import (
    Completion,
    OnCompletion,
    RolloutError,
    SamplingParams,
    check_counts,
    check_prompts,
)
from .sampling import sample, uniforms

#: Fewer rows than this are not worth a worker: each of them reads all the weights.
WORKER_ROWS = 16
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


@dataclasses.dataclass(frozen=True)
class _Row:
    """Sample `sample` of prompt `prompt` (an index into what `generate` was given)."""

    prompt: int
    sample: int


class TransformersEngine:
    """Samples from `policy.model`, any causal decoder that takes transformers' attention interface.

    max_rows: samples decoded together; more are decoded batch after batch, shortest prompts first.
    prefill_tokens: prompt tokens of one prefill forward. workers: threads that decode parts of a
    batch side by side (default: on a CPU one per torch thread and 16 rows, on a GPU 1).
    Raises ValueError for models whose layers are not plain or sliding-window attention.
    """

    name = "transformers"

    def __init__(
        self,
        policy: Any,
        *,
        shares_weights: bool = True,
        max_rows: int = 256,
        prefill_tokens: int = 8192,
        workers: int | None = None,
    ) -> None:
        options = {"max_rows": max_rows, "prefill_tokens": prefill_tokens, "workers": workers}
        for option, value in options.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"TransformersEngine: {option}={value!r}: expected >= 1")
        model = policy.model
        model_name = type(model).__name__
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        if kinds - SUPPORTED_LAYERS:
            raise ValueError(
                f"TransformersEngine: {model_name} has layers of type "
                f"{sorted(kinds - SUPPORTED_LAYERS)}; supported: {sorted(SUPPORTED_LAYERS)}"
            )
        if not getattr(model, "_supports_attention_backend", False):
            raise ValueError(
                f"TransformersEngine: {model_name} does not take custom attention "
                "(transformers' AttentionInterface)"
            )
        self.policy = policy
        self.max_rows, self.prefill_tokens, self.workers = max_rows, prefill_tokens, workers
        self._shares_weights, self._version = shares_weights, 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the head, and so of the logits."""
        return self.policy.head().weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the policy is; read at every use, since a trainer may move it."""
        return self.policy.head().weight.device

    @property
    def shares_weights(self) -> bool:
        """True unless the engine was made from a path."""
        return self._shares_weights

    @property
    def version(self) -> int:
        """Of the last sync."""
        return self._version

    def close(self) -> None:
        """Nothing to release: the module is the trainer's."""

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Shared weights: only the version is noted. A copy of its own: copied in by name."""
        if not self.shares_weights:
            own = dict(self.policy.model.named_parameters()) | dict(
                self.policy.model.named_buffers()
            )
            with torch.no_grad():
                for name, tensor in weights:
                    # A tied head may be listed too; its tensor comes with the embedding.
                    if name not in own and name.startswith("lm_head"):
                        continue
                    if name not in own:
                        raise RolloutError(f"sync: the engine's model has no weight {name!r}")
                    own[name].copy_(tensor)
        self._version = version

    # -- sampling ----------------------------------------------------------------------------
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seed: int,
        counts: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[list[Completion]]:
        """See `Rollout.generate`."""
        check_prompts(prompts, self.policy.max_length)
        wanted = check_counts(counts, len(prompts), params.n)
        done: list[list[Completion | None]] = [[None] * count for count in wanted]
        lock = threading.Lock()

        def finish(row: _Row, completion: Completion) -> None:
            done[row.prompt][row.sample] = completion
            if on_completion is not None:
                with lock:
                    on_completion(row.prompt, row.sample, completion)

        with decoding(self.policy.model):
            for batch in self._batches(prompts, wanted):
                self._run_all(
                    [(prompts, part, params, seed, finish) for part in self._parts(batch)]
                )
        return done  # type: ignore[return-value]

    def _batches(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> Iterator[list[_Row]]:
        """Rows sorted by prompt length, equal prompts adjacent, at most `max_rows` at a time."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i))
        rows = [_Row(i, j) for i in order for j in range(counts[i])]
        for begin in range(0, len(rows), self.max_rows):
            yield rows[begin : begin + self.max_rows]

    def _parts(self, batch: list[_Row]) -> list[list[_Row]]:
        """One part for each worker, cut between prompts where that leaves the parts about even."""
        count = self.workers
        if count is None:
            cpu = self.device.type == "cpu"
            count = min(torch.get_num_threads(), len(batch) // WORKER_ROWS) if cpu else 1
        parts, begin = [], 0
        for left in range(max(1, min(count, len(batch))), 0, -1):
            even = begin + (len(batch) - begin) // left
            ends = [
                i for i in range(begin + 1, len(batch)) if batch[i].prompt != batch[i - 1].prompt
            ]
            near = min(ends, key=lambda i: abs(i - even), default=even)
            end = near if abs(near - even) <= (even - begin) // 4 else even
            end = len(batch) if left == 1 else end
            parts.append(batch[begin:end])
            begin = end
        return parts

    def _run_all(self, jobs: list[tuple[Any, ...]]) -> None:
        """Each part in a thread of its own with its share of torch's threads.

        Decoding multiplies a few rows by large weights, hundreds of short calls a token; on a CPU
        two independent halves are faster than one batch whose every call waits for both cores
        (and much faster when another process has one of them).
        """
        if len(jobs) == 1:
            return self._run(*jobs[0])
        threads = torch.get_num_threads()
        share = max(1, threads // len(jobs))
        try:
            with ThreadPoolExecutor(len(jobs), "rollout", torch.set_num_threads, (share,)) as pool:
                list(pool.map(lambda job: self._run(*job), jobs))  # to raise what they raised
        finally:
            # The number is also kept for the whole process, where threads made later read it.
            torch.set_num_threads(threads)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        batch: list[_Row],
        params: SamplingParams,
        seed: int,
        finish: Callable[[_Row, Completion], None],
    ) -> None:
        device, limit = self.device, params.max_new_tokens
        lengths = torch.tensor([len(prompts[row.prompt]) for row in batch], device=device)
        noise = torch.stack(
            [torch.from_numpy(uniforms(seed, row.prompt, row.sample, limit)) for row in batch]
        ).to(device)
        stops = frozenset(params.stop_token_ids)
        stop = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)
        room = (self.policy.max_length - lengths).clamp(max=limit)  # tokens a row may still get
        tokens = torch.zeros(len(batch), limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(batch), limit, device=device)
        live = torch.arange(len(batch), device=device)  # cache row -> index into `batch`

        cache = KVCache(len(batch), int(lengths.max()), device)
        with using(cache):
            logits = self._prefill(prompts, batch, cache)
            for t in range(limit):
                token, logprob = sample(logits, noise[live, t], params)
                tokens[live, t], logprobs[live, t] = token, logprob
                finished = torch.isin(token, stop) | (room[live] <= t + 1)
                if bool(finished.any()):
                    ended = live[finished]
                    drawn = zip(
                        ended.tolist(), tokens[ended, : t + 1].tolist(),
                        logprobs[ended, : t + 1].tolist(), strict=True,
                    )  # fmt: skip
                    for i, ids, logps in drawn:
                        finish(batch[i], _completion(batch[i], ids, logps, stops))
                    order = cache.drop(finished)
                    live, token = live[order], token[order]
                    if not len(live):
                        break
                cache.start_decode()
                position = lengths[live] + t
                logits = self._logits(self._hidden(token[:, None], position[:, None], cache)[:, 0])

    def _prefill(
        self, prompts: Sequence[Sequence[int]], batch: list[_Row], cache: KVCache
    ) -> Tensor:
        """Run each distinct prompt of the batch once; returns the next-token logits [rows, V]."""
        distinct: list[tuple[Sequence[int], slice]] = []
        for i, row in enumerate(batch):
            prompt = prompts[row.prompt]
            if distinct and (
                batch[i - 1].prompt == row.prompt or list(distinct[-1][0]) == list(prompt)
            ):
                distinct[-1] = (distinct[-1][0], slice(distinct[-1][1].start, i + 1))
            else:
                distinct.append((prompt, slice(i, i + 1)))
        logits, begin = [], 0
        while begin < len(distinct):
            end, budget = begin, self.prefill_tokens
            while end < len(distinct) and (end == begin or len(distinct[end][0]) <= budget):
                budget -= len(distinct[end][0])
                end += 1
            part = distinct[begin:end]
            hidden = self._packed(cache, [p for p, _ in part], [owner for _, owner in part])
            last = torch.tensor([len(p) for p, _ in part], device=self.device).cumsum(0) - 1
            logits.append(self._logits(hidden[last]))
            begin = end
        repeats = torch.tensor([o.stop - o.start for _, o in distinct], device=self.device)
        return torch.cat(logits).repeat_interleave(repeats, 0)

    def _packed(
        self, cache: KVCache, sequences: Sequence[Sequence[int]], owners: Sequence[slice]
    ) -> Tensor:
        """Hidden states [T, D] of whole sequences packed into one row."""
        cache.start_prefill([len(s) for s in sequences], owners)
        flat = torch.tensor([t for s in sequences for t in s], device=self.device)
        position = torch.cat([torch.arange(len(s), device=self.device) for s in sequences])
        return self._hidden(flat[None], position[None], cache)[0]

    def _hidden(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        out = self.policy.model.base_model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.policy.head()
        logits = F.linear(hidden, head.weight, head.bias)
        if head.logit_scale != 1.0 or head.softcap:
            logits = logits.float() * head.logit_scale
            if head.softcap:
                logits = head.softcap * torch.tanh(logits / head.softcap)
        return logits

    # -- scoring -----------------------------------------------------------------------------
    def score(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """log_softmax(logits)[completion[t]] in fp32, by one forward of prompt + completion."""
        whole = [*prompt, *completion]
        check_prompts([prompt], self.policy.max_length)
        if len(whole) > self.policy.max_length:
            raise ValueError(
                f"score: prompt {len(prompt)} + completion {len(completion)} tokens; "
                f"the context holds {self.policy.max_length}"
            )
        if not completion:
            return []
        cache = KVCache(1, len(whole), self.device)
        with decoding(self.policy.model), using(cache):
            hidden = self._packed(cache, [whole], [slice(0, 1)])[len(prompt) - 1 : -1]
            logits = self._logits(hidden).float()
        target = torch.tensor(list(completion), device=self.device)
        return (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)).tolist()


def _completion(row: _Row, ids: list[int], logps: list[float], stops: frozenset[int]) -> Completion:
    bad = next((t for t, value in enumerate(logps) if value != value), None)
    if bad is not None:
        raise RolloutError(
            f"generate: NaN log-prob at token {bad} of sample {row.sample} of "
            f"prompts[{row.prompt}]: the model's logits are not finite"
        )
    return Completion(ids, logps, "stop" if ids[-1] in stops else "length")
