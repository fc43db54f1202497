"""A sampler: one vLLM engine that samples groups of responses and swaps weights between them, in one thread, no Ray.

Requests of several groups are in the engine together; a group is handed on when all its requests have ended.
"""

import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r3hf_ray.actors.environment import VLLM, VLLM_ON_CPU
from r3hf_ray.errors import RunFailed, sentence_of
from r3hf_ray.sections.actors import SEQUENCES, EngineFacts, RolloutSection
from r3hf_ray.types import Failure, Finish, GroupReport, Request, SampleGroup, Trajectory
from r3hf_ray.weights.contract import Loaded, Probe, Publication, TransferStep

Made = tuple[list[Trajectory], GroupReport]
"""What is handed on of a group: the data, and what the coordinator may know of it."""


class StaleWeightsError(RuntimeError):
    """The engine was asked to sample before it had loaded a published version."""


@dataclass(slots=True)
class _Open:
    """A group in the engine: vLLM's ids of its requests, and what has ended."""

    group: SampleGroup
    ids: list[str]
    ended: dict[int, Any] = field(default_factory=dict)
    """Place in the group -> vLLM's output."""


class Sampler:
    """One engine: `add` groups, `step` until they come out."""

    def __init__(self, section: RolloutSection, facts: EngineFacts) -> None:
        """Start the engine."""
        os.environ.update(engine_environment(section))  # also when used without Ray
        self._section, self._facts = section, facts
        self._version: int | None = None
        self._received = False
        self._open: dict[int, _Open] = {}
        self._places: dict[str, tuple[int, int]] = {}  # a request's id -> (group, place in it)
        self._worked = 0.0
        self._llm = make_engine(section, facts)
        if facts.unknown_ids:
            self._llm.collective_rpc("r3hf_mask_logits", args=(list(facts.unknown_ids),))

    @property
    def idle(self) -> bool:
        """Nothing is in the engine."""
        return not self._open

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

    def add(self, group: SampleGroup) -> None:
        """Put a group into the engine; if that fails, nothing of it is left there.

        Raises:
            StaleWeightsError: no weights were loaded since the process (re)started.
        """
        if self._version is None:
            raise StaleWeightsError("this rollout actor has restarted and has no published weights yet")
        ids = self._enqueue(group.requests)
        self._open[group.number] = _Open(group, ids)
        # vLLM's outputs bear the number it counted; the id it aborts by has letters of its own behind it.
        self._places |= {name.partition("-")[0]: (group.number, place) for place, name in enumerate(ids)}

    def step(self) -> list[Made]:
        """One step of the engine; the groups that it ended."""
        start = time.perf_counter()
        for output in self._llm.llm_engine.step():
            number, place = self._places.pop(output.request_id, (0, -1)) if output.finished else (0, -1)
            if place >= 0:
                self._open[number].ended[place] = output
        self._worked += time.perf_counter() - start
        made = [self._made(opened) for opened in self._open.values() if len(opened.ended) == len(opened.ids)]
        for _, report in made:  # only now: whatever is raised above, `drop` still knows every group
            del self._open[report.number]
        return made

    def abort(self, number: int) -> bool:
        """Take a group out of the engine, if it is there; nothing is handed on of it."""
        opened = self._open.pop(number, None)
        if opened:
            self._llm.llm_engine.abort_request(opened.ids, internal=True)
            for name in opened.ids:
                self._places.pop(name.partition("-")[0], None)
        return opened is not None

    def drop(self, reason: str) -> list[Made]:
        """The engine broke: every group comes back empty, and the engine forgets what it held.

        vLLM counts the tokens of a failed step as computed and never schedules them again: the requests would wait for
        ever.
        """
        engine = self._llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        numbers = list(self._open)
        self._open, self._places = {}, {}
        return [broken(number, reason) for number in numbers]

    def generate(self, requests: list[Request]) -> Made:
        """Sample one response to each request, and wait for all.

        Raises:
            StaleWeightsError: no weights were loaded.
            RunFailed: a step of the engine fails; nothing is left in it.
        """
        self.add(SampleGroup(number=-1, requests=requests))
        made: list[Made] = []
        while not self.idle:
            try:
                made += self.step()
            except Exception as error:
                self.drop(sentence_of(error))
                raise
        if not made:
            raise RunFailed("the engine ended without an answer")
        return made[0]

    def _enqueue(self, requests: list[Request]) -> list[str]:
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
        ids: list[str] = self._llm.enqueue(prompts, params, use_tqdm=False)
        return ids

    def _made(self, opened: _Open) -> Made:
        made = [self._trajectory(request, opened.ended[place]) for place, request in enumerate(opened.group.requests)]
        trajectories = [item for item in made if isinstance(item, Trajectory)]
        worked, self._worked = self._worked, 0.0
        report = GroupReport(
            infos=[trajectory.info for trajectory in trajectories],
            failures=[item for item in made if isinstance(item, Failure)],
            seconds=worked,
            number=opened.group.number,
        )
        return trajectories, report

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


def broken(number: int, reason: str) -> Made:
    """What is handed on of a group that was in a broken engine, or could not be put into it."""
    return [], GroupReport(infos=[], failures=[], seconds=0.0, number=number, broken=reason)


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
        "max_num_seqs": SEQUENCES,
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
