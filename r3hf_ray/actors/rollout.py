"""Rollout actor: one vLLM engine that samples responses and swaps weights between calls.

Call order is the lock: the actor is synchronous and the coordinator is its only submitter, so a `load_weights`
submitted before a `generate` is finished before it, and every trajectory has one `policy_version`.
"""

import os
import time
from typing import Any

import numpy as np
import ray

from r3hf_ray.actors.environment import VLLM, VLLM_ON_CPU
from r3hf_ray.sections.actors import EngineFacts, RolloutSection
from r3hf_ray.types import ChunkReport, Failure, Finish, Request, Trajectory
from r3hf_ray.weights.contract import Loaded, Probe, Publication, TransferStep


class StaleWeightsError(RuntimeError):
    """The engine was asked to sample before it had loaded a published version."""


class RolloutActor:
    """One engine. `generate` returns two objects: trajectories (a ref for the reward actor) and the report."""

    def __init__(self, section: RolloutSection, facts: EngineFacts) -> None:
        """Start the engine."""
        os.environ.update(engine_environment(section))  # also when used without Ray
        self._section, self._facts = section, facts
        self._version: int | None = None
        self._received = False
        self._llm = make_engine(section, facts)
        if facts.unknown_ids:
            self._llm.collective_rpc("r3hf_mask_logits", args=(list(facts.unknown_ids),))

    @ray.method(concurrency_group="health")
    def ping(self) -> None:
        """Answer, once the engine stands."""

    def load_weights(self, publication: Publication) -> Loaded:
        """Load one published version, drop the prefix cache, and answer with what was loaded."""
        from r3hf_ray.weights.engine import load

        start = time.perf_counter()
        self._version = None  # if anything below fails, sampling is refused until a load succeeds
        if not publication.parts and not self._received:
            raise ValueError("the publication has no content, and nothing was broadcast to this sampler since its last")
        loaded = load(self._llm, self._facts.medium, publication.parts) if publication.parts else ""
        self._received = False
        if not self._llm.reset_prefix_cache():
            raise StaleWeightsError("vLLM refused to reset its prefix cache: old keys and values would be reused")
        gap = self._probe_gap(publication.probe) if publication.probe else 0.0
        self._version = publication.version
        return Loaded(
            version=publication.version, fingerprint=loaded, probe_gap=gap, seconds=time.perf_counter() - start
        )

    def transfer(self, step: TransferStep, payload: dict[str, Any] | None) -> None:
        """One call of vLLM's weight-transfer interface; sampling is refused until `load_weights` proves the rest."""
        self._version = None
        self._llm.collective_rpc(step.value, args=() if payload is None else (payload,))
        self._received = step is TransferStep.FINISH

    def generate(self, requests: list[Request]) -> tuple[list[Trajectory], ChunkReport]:
        """Sample one response to each request.

        Raises:
            StaleWeightsError: no weights were loaded since the process (re)started.
        """
        if self._version is None:
            raise StaleWeightsError("this rollout actor has restarted and has no published weights yet")
        start = time.perf_counter()
        outputs = self._sample(requests)
        made = [self._trajectory(request, output) for request, output in zip(requests, outputs, strict=True)]
        trajectories = [item for item in made if isinstance(item, Trajectory)]
        failures = [item for item in made if isinstance(item, Failure)]
        report = ChunkReport(
            infos=[trajectory.info for trajectory in trajectories],
            failures=failures,
            seconds=time.perf_counter() - start,
        )
        return trajectories, report

    def _sample(self, requests: list[Request]) -> list[Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=self._section.temperature,
                max_tokens=self._section.max_response_tokens,
                seed=request.seed,
                logprobs=0,
                stop_token_ids=list(self._facts.eos_ids),
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.token_ids.tolist()} for request in requests]
        try:
            return self._llm.generate(prompts, params, use_tqdm=False)
        except Exception:
            self._forget()
            raise

    def _forget(self) -> None:
        """Drop what a failed call left in the engine.

        vLLM counts those tokens as computed and never schedules them again: the next call would wait for ever.
        """
        engine = self._llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def _trajectory(self, request: Request, output: Any) -> Trajectory | Failure:
        sampled = output.outputs[0]
        prompt = request.token_ids
        tokens = np.asarray(sampled.token_ids, dtype=np.int32)
        logprobs = np.asarray(
            [step[token].logprob for step, token in zip(sampled.logprobs, sampled.token_ids, strict=True)],
            dtype=np.float32,
        )
        if len(tokens) == 0 or not np.isfinite(logprobs).all():
            reason = "empty response" if len(tokens) == 0 else "a behaviour logprob is not finite"
            return Failure(prompt_id=request.prompt_id, sample=request.sample, call="generate", reason=reason)
        return Trajectory(
            prompt_id=request.prompt_id,
            sample=request.sample,
            attempt=request.attempt,
            policy_version=self._version if self._version is not None else -1,
            prompt_len=len(prompt),
            finish=Finish.EOS if int(tokens[-1]) in self._facts.eos_ids else Finish.LENGTH,
            token_ids=np.concatenate([prompt, tokens]),
            behavior_logprobs=np.concatenate([np.zeros(len(prompt), np.float32), logprobs]),
        )

    def _probe_gap(self, probe: Probe) -> float:
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = self._llm.generate([{"prompt_token_ids": probe.token_ids}], params, use_tqdm=False)[0]
        ours = [
            step[token].logprob for step, token in zip(output.prompt_logprobs[1:], probe.token_ids[1:], strict=True)
        ]
        return float(np.mean(np.abs(np.asarray(ours) - np.asarray(probe.logprobs))))


def engine_environment(section: RolloutSection) -> dict[str, str]:
    """Environment of an engine's process; vLLM reads it at import."""
    if section.gpus_per_actor > 0:
        return VLLM
    return VLLM_ON_CPU | {"OMP_NUM_THREADS": str(section.threads), "VLLM_CPU_KVCACHE_SPACE": str(section.kv_cache_gb)}


def make_engine(section: RolloutSection, facts: EngineFacts) -> Any:
    """An in-process vLLM engine that takes token ids, gives processed logprobs, and never detokenizes.

    `generation_config="vllm"` keeps a model folder's own sampling settings (top_p and such) out of the run;
    eager mode avoids minutes of compilation on CPU.
    """
    from vllm import LLM

    from r3hf_ray.weights.engine import llm_arguments

    on_gpu = section.gpus_per_actor > 0
    defaults: dict[str, Any] = {
        "enforce_eager": not on_gpu,
        "max_num_seqs": 256,
        "disable_log_stats": True,
    }
    if not on_gpu:
        # vLLM 0.32 rewinds the generator of a seeded request whose prompt was cut in chunks, which a CPU generator
        # cannot do: with more prompt tokens than one step takes, the whole call would fail.
        defaults |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, facts.max_model_len)}
    return LLM(
        model=facts.model,
        skip_tokenizer_init=True,
        dtype=section.dtype,
        max_model_len=facts.max_model_len,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        gpu_memory_utilization=section.gpu_memory_utilization,
        **llm_arguments(facts.medium),
        **(defaults | section.engine_args),
    )
