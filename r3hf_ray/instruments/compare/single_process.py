"""A PPO run in one process: the system's own engine, scorer and learner, called one after another, without Ray.

It computes what the system computes at lag 0 with one learner rank (the same seeds, prompts, minibatches and code; a
test holds the two together) at a fraction of the cost, since one engine serves many runs. It is for screening: no
failure is retried and nothing resumes inside a run. Results of record come from the system.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from r3hf_ray.actors.dispatch import ScoredRef
from r3hf_ray.actors.sampler import Sampler
from r3hf_ray.actors.shares import FillingBatch, RankShare, calibration_of, evaluation_metrics
from r3hf_ray.config import PPOConfig
from r3hf_ray.draws import step_requests, stream_requests
from r3hf_ray.errors import RunFailed
from r3hf_ray.instruments.compare.schedules import Schedule, at_step, check_schedules, remixed
from r3hf_ray.preflight import Plan, check
from r3hf_ray.records.jsonl import JsonlLog, read_jsonl
from r3hf_ray.records.metrics import STEP
from r3hf_ray.records.run_folder import open_run
from r3hf_ray.scoring.scorer import Scorer
from r3hf_ray.sections.actors import EngineFacts, RolloutSection
from r3hf_ray.training.experience import RewardScale
from r3hf_ray.training.ppo import PPOLearner
from r3hf_ray.types import Failure, Request, ScoredTrajectory, TrajectoryInfo
from r3hf_ray.weights.contract import objection
from r3hf_ray.weights.in_process import publication


class Workbench:
    """Runs configurations one after another; the engine is kept while its settings stay the same."""

    def __init__(self) -> None:
        self._engine: tuple[tuple[RolloutSection, EngineFacts], Sampler] | None = None

    def run(self, config: PPOConfig, schedules: tuple[Schedule, ...] = ()) -> Path:
        """One run, from its configuration to a folder with ``metrics.jsonl`` and ``events.jsonl``; no model is saved.

        Raises:
            ConfigError: the configuration cannot be used, or the folder exists and is not of an unfinished run of this
                kind, which begins again.
            RunFailed: a sample could not be made or scored, or the engine runs other weights than the learner.
            DivergenceError: a loss is not finite.
        """
        torch.set_num_threads(config.learner.threads)
        check_schedules(config, schedules)
        plan = check(config)
        config = plan.config
        _clear(config.run.folder / config.run.name)
        folder, _ = open_run(config, config.run, resume=False)
        metrics, events = JsonlLog(folder / "metrics.jsonl"), JsonlLog(folder / "events.jsonl")
        with metrics, events:
            events.write({"event": "started", "step": 0, "in_process": True, "schedules": list(map(str, schedules))})
            run = _Run(config, schedules, plan, self._engine_for(config, plan), folder)
            for row in run.rows():
                metrics.write({"time": time.time(), **row})
            events.write({"event": "finished", "step": config.ppo.steps})
        return folder

    def _engine_for(self, config: PPOConfig, plan: Plan) -> Sampler:
        settings = (config.rollout, replace(plan.engine, medium="in_process"))
        if self._engine is None or self._engine[0] != settings:
            self._engine = (settings, Sampler(*settings))
            logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns at every load of weights, of nothing
        return self._engine[1]


class _Run:
    def __init__(
        self, config: PPOConfig, schedules: tuple[Schedule, ...], plan: Plan, engine: Sampler, folder: Path
    ) -> None:
        self._config, self._schedules, self._plan, self._engine = config, schedules, plan, engine
        self._scorer = Scorer(plan.scoring)
        self._learner = PPOLearner(config, scale=RewardScale(), device="cpu", mesh=None, capsules=folder / "divergence")

    def rows(self) -> list[dict[str, float]]:
        """Every row of the run's metrics."""
        config = self._config
        self._publish()
        self._calibrate()
        rows, every = [self._evaluation(0)], config.evaluation.every
        for step in range(1, config.ppo.steps + 1):
            rows.append(self._step(step - 1))
            self._publish()
            if step == config.ppo.steps or (every and step % every == 0):
                rows.append(self._evaluation(step))
        return rows

    def _step(self, step: int) -> dict[str, float]:
        start = time.perf_counter()
        self._learner.config = config = at_step(self._config, self._schedules, step)
        if any(schedule.field == "ppo.kl_coef" for schedule in self._schedules):
            self._learner.kl_coef = config.ppo.kl_coef
        requests = step_requests(self._plan.prompts, config.rollout, seed=config.run.seed, step=step)
        scored = self._scored(requests)
        share = share_of(scored, [self._scorer.judge(item) for item in scored], config, step)
        if config.reward.beta_c != self._config.reward.beta_c:
            scored = [remixed(item, config.reward.beta_c) for item in scored]
        known = {name: value for name, value in share.metrics.items() if not name.startswith("time/")}
        metrics = self._learner.update(scored, minibatch_of=share.minibatch_of) | known
        return {STEP: step + 1, **metrics, "time/step": time.perf_counter() - start}

    def _publish(self) -> None:
        published = publication(self._learner.full_parameters, self._learner.step)
        if wrong := objection(published, self._engine.load_weights(published), max_gap=0.0):
            raise RunFailed(f"the engine {wrong}")

    def _calibrate(self) -> None:
        config = self._config
        count = config.reward.calibration_samples
        if not count:
            return
        requests = stream_requests(self._plan.prompts, count, seed=config.run.seed, stream="calibration")
        moments = calibration_of([self._scorer.judge(item) for item in self._scored(requests)], config)
        for name, (mean, std) in moments.items():
            self._learner.set_scale(RewardScale(mean=mean, scale=std if std > 0 else 1.0), name)

    def _evaluation(self, step: int) -> dict[str, float]:
        config, heldout = self._config, self._plan.heldout
        count = min(config.evaluation.prompts, len(heldout))
        if not count:
            return {STEP: step}
        requests = stream_requests(heldout, count, seed=config.run.seed, stream="heldout")
        return {STEP: step, **evaluation_metrics([self._scorer.judge(item) for item in self._scored(requests)])}

    def _scored(self, requests: Sequence[Request]) -> list[ScoredTrajectory]:
        trajectories, report = self._engine.generate(list(requests))
        results = self._scorer.score(trajectories)
        failures = [*report.failures, *(item for item in results if isinstance(item, Failure))]
        if failures:
            raise RunFailed(f"{failures[0].call}: {failures[0].reason}")
        return [item for item in results if isinstance(item, ScoredTrajectory)]


def share_of(
    scored: Sequence[ScoredTrajectory], infos: Sequence[TrajectoryInfo], config: PPOConfig, step: int
) -> RankShare:
    """The batch of step ``step`` as a single learner rank gets it; its refs are the trajectories themselves."""
    batch = FillingBatch(expected=len(scored), samples=list(map(ScoredRef, infos, scored)))
    alone = config.model_copy(update={"learner": config.learner.model_copy(update={"ranks": 1})})
    return batch.share(alone, step, rank=0)


def _clear(folder: Path) -> None:
    """Remove what an interrupted run of this kind left: it cannot go on, and its first rows would be there twice."""
    events = read_jsonl(folder / "events.jsonl")
    if events and events[0].get("in_process") and not any(event["event"] == "finished" for event in events):
        shutil.rmtree(folder)
