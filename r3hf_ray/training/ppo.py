"""PPO with token-level rewards on one rank of a group; the results do not depend on how many ranks there are."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from r3hf_ray.algorithms.advantages import next_kl_coef
from r3hf_ray.algorithms.batching import collate
from r3hf_ray.algorithms.lagrange import next_multiplier
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import CheckpointError, DivergenceError
from r3hf_ray.models import checkpoint
from r3hf_ray.models.folder import ModelFolder
from r3hf_ray.models.sharding import (
    DTYPES,
    all_reduce_max,
    full_parameters,
    grad_norm,
    reduce_gradients,
    scale_gradients,
)
from r3hf_ray.training.divergence import write_capsule
from r3hf_ray.training.experience import (
    Experience,
    RewardScale,
    evaluate,
    make_experience,
    require_telescoping,
)
from r3hf_ray.training.guard_rails import WATCHED, length_drift
from r3hf_ray.training.minibatches import Minibatch, plan_minibatches
from r3hf_ray.training.optimizers import adamw, eps_share, lr_share
from r3hf_ray.training.ppo_losses import LossShare, critic_share, policy_divisor, policy_share
from r3hf_ray.training.ppo_metrics import experience_metrics, reduce_named, token_rows
from r3hf_ray.training.trained_models import trained_critic, trained_policy
from r3hf_ray.types import COST, MAIN, ScoredTrajectory
from r3hf_ray.user_functions import user_function


class PPOLearner:
    """The policy, the critic and their optimizers on one rank. All ranks call every method together, but `samples`.

    There is no critic where `ppo.advantage` needs none. ``first`` holds the first step's `guard_rails.WATCHED` metrics.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        scale: RewardScale,
        device: torch.device | str,
        mesh: DeviceMesh | None,
        capsules: Path | None = None,
    ) -> None:
        """Load and shard the models.

        Args:
            config: of the run.
            scale: of the main model's rewards; further models begin at mean 0 and scale 1. A checkpoint replaces all.
            device: of this rank.
            mesh: of all ranks (`sharding.make_mesh`); None for a single rank.
            capsules: where a `DivergenceError` leaves its capsule; ``<run folder>/divergence`` when left out.

        Raises:
            ModelError: a model cannot be used.
        """
        self.config, self.device = config, torch.device(device)
        self.step = 0
        self.scales = dict.fromkeys(config.model.weights(0.0), RewardScale()) | {MAIN: scale}
        self.kl_coef, self.multiplier = config.ppo.kl_coef, config.cost.multiplier
        folder = ModelFolder(config.model.policy, "policy")
        self.tokenizer, self._pad_id = folder.tokenizer, folder.pad_id
        self.policy = trained_policy(config, device=self.device, mesh=mesh)
        folder.name_ends(self.policy.model)
        self.critic = trained_critic(config, scale, device=self.device, mesh=mesh)
        rates = {"policy": config.optimizer.policy_lr, "critic": config.optimizer.critic_lr}
        self._rates = {name: rates[name] for name in self._modules()}
        self._optimizers: dict[str, Optimizer] = {
            name: adamw(part, config.optimizer, rates[name]) for name, part in self._modules().items()
        }
        self._optimizer_steps = 0
        self.first: dict[str, float] = {}
        self._capsules = capsules or config.run.folder / config.run.name / "divergence"
        self._last: tuple[list[ScoredTrajectory], Experience] | None = None
        self._seconds: dict[str, float] = {}

    def update(self, scored: list[ScoredTrajectory], *, minibatch_of: list[list[int]]) -> dict[str, float]:
        """One PPO step on this rank's share of a batch.

        Args:
            scored: this rank's trajectories, at least one.
            minibatch_of: for each epoch, the minibatch of each trajectory, 0 to ppo.minibatches - 1 (from `plan`, so
                that a minibatch's rows do not depend on the number of ranks).

        Returns:
            Metrics over all ranks, the same on each.

        Raises:
            TelescopingError: a response's token rewards do not add up.
            DivergenceError: a loss or gradient is not finite; a capsule has been written.
            ValueError: there is no trajectory, `minibatch_of` does not fit, or other models scored than the run has.
        """
        if not scored or any(len(row) != len(scored) for row in minibatch_of):
            raise ValueError(f"{len(scored)} trajectories, but minibatches for {[len(row) for row in minibatch_of]}")
        self._seconds = dict.fromkeys(("evaluate", "advantage", "train_policy", "train_critic"), 0.0)
        batch = collate(scored, pad_id=self._pad_id).to(self.device)
        error = require_telescoping(batch, self.config)
        with self._timed("evaluate"):
            seen = evaluate(self.policy, self.critic, batch, self.config)
        with self._timed("advantage"):
            prices = {"kl_coef": self.kl_coef, "multiplier": self.multiplier}
            experience = make_experience(batch, seen, error, self.config, scales=self.scales, **prices)
        ppo = self.config.ppo
        minibatches = plan_minibatches(
            experience, minibatch_of, count=ppo.minibatches, budget_tokens=ppo.microbatch_tokens
        )
        steps = [self._optimizer_step(minibatch, experience) for minibatch in minibatches]
        metrics = experience_metrics(experience, self.config, step=self.step)
        self.first = self.first or {name: metrics[name] for name in WATCHED}
        metrics["rollout/length_drift"] = length_drift(metrics, self.first)
        metrics |= {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        metrics["policy/ratio/max"] = max(step["policy/ratio/max"] for step in steps)
        metrics |= {f"{name}/eps_share": eps_share(optimizer) for name, optimizer in self._optimizers.items()}
        if ppo.old_logprobs == "sampler":  # nothing else is between them before the first update
            metrics["kl/sampler/start"] = steps[0]["policy/approx_kl"]
        metrics |= {"policy/lr": steps[-1]["policy/lr"]} | self._adapt_prices(metrics) | self._slowest()
        self.step += 1
        self._last = (scored, experience)
        return metrics

    def set_scale(self, scale: RewardScale, model: str = MAIN) -> None:
        """Take the scale of a model's rewards, which samples of the first published weights have shown."""
        self.scales[model] = scale
        if model == MAIN and self.critic is not None and self.config.critic_init == "reward_model":
            # The critic's head is the reward model's and speaks in its units.
            self.critic.mean.fill_(scale.mean)
            self.critic.scale.fill_(scale.scale / self.config.model.reward_weight)

    @torch.no_grad()
    def evaluate_probe(self, token_ids: list[int]) -> list[float]:
        """Logprobs at temperature 1 of a fixed sequence, one a token; the first, which nothing predicts, is 0."""
        ids = torch.tensor([token_ids], device=self.device)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        predicted = everywhere.clone()
        predicted[:, 0] = False
        return self.policy(ids, everywhere, predicted, temperature=1.0)[0].tolist()

    def samples(self, count: int) -> list[dict[str, Any]]:
        """One row a response token of this rank's first ``count`` trajectories of the last batch; `gold` is None."""
        if self._last is None:
            return []
        scored, experience = self._last
        name = self.config.reward.gold_credit
        known = user_function(name, field="reward.gold_credit") if name else None
        return token_rows(scored[:count], experience, step=self.step, decode=self.tokenizer.decode, gold_credit=known)

    def full_parameters(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The policy's parameters, whole, by their transformers names (see `sharding.full_parameters`)."""
        return full_parameters(self.policy.model, dtype)

    def save(self, folder: Path) -> None:
        """Write a sharded checkpoint of all that training needs to go on bit by bit.

        Raises:
            CheckpointError: the folder holds one already.
        """
        checkpoint.save(folder, modules=self._modules(), optimizers=self._optimizers, extra=self._progress())

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, on any number of ranks.

        Raises:
            CheckpointError: it is incomplete, of other models, or of another learning-rate schedule.
        """
        extra = checkpoint.load(folder, modules=self._modules(), optimizers=self._optimizers)
        saved, asked = extra.get("lr_schedule", "constant"), self.config.optimizer.lr_schedule
        if saved != asked:
            raise CheckpointError(f"{folder}: optimizer.lr_schedule was {saved} and is {asked} now: go on with {saved}")
        self.step, self._optimizer_steps, self.first = extra["step"], extra["optimizer_steps"], extra["first"]
        self.kl_coef, self.multiplier = extra["kl_coef"], extra["multiplier"]
        self.scales = {name: RewardScale(**scale) for name, scale in extra["scales"].items()}

    def save_pretrained(self, folder: Path) -> None:
        """Write the policy as a folder that transformers and vLLM load as it is."""
        dtype = DTYPES[self.config.learner.dtype]
        checkpoint.save_pretrained(
            self.full_parameters(dtype),
            folder,
            config=self.policy.model.config,
            generation_config=self.policy.model.generation_config,
            tokenizer=self.tokenizer,
            dtype=dtype,
        )

    def _optimizer_step(self, minibatch: Minibatch, experience: Experience) -> dict[str, float]:
        """Both backward passes, then both steps, so that a capsule holds both models as the losses saw them."""
        sums: dict[str, Tensor] = {}
        norms: dict[str, float] = {}
        for name, module in self._modules().items():
            with self._timed(f"train_{name}"):
                of_model, norms[name] = self._backward(module, *self._share_of(name, minibatch), minibatch)
            sums |= {f"{name}/{key}": value[None] for key, value in of_model.items()}
        sums["padding"] = minibatch.padding
        maxima = {"policy/ratio/max": sums.pop("policy/ratio_max")[0]}
        added, largest = reduce_named(sums, maxima)
        padded, real = added.pop("padding")
        metrics = {name: value / minibatch.num_tokens for name, (value,) in added.items()} | largest
        metrics |= {f"{name}/loss": added[f"{name}/loss"][0] for name in norms} | {"perf/padding": padded / real}
        metrics |= {f"{name}/grad_norm": norm for name, norm in norms.items()}
        metrics["policy/ratio/mean"] = metrics.pop("policy/ratio")
        self._require_finite(metrics, minibatch, experience)
        rate = lr_share(self.config.optimizer, self._optimizer_steps, self.config.optimizer_steps)
        for name, module in self._modules().items():
            with self._timed(f"train_{name}"):
                self._apply(module, self._optimizers[name], norms[name], self._rates[name] * rate)
        self._optimizer_steps += 1
        return metrics | {"policy/lr": self.config.optimizer.policy_lr * rate}

    def _share_of(self, name: str, minibatch: Minibatch) -> tuple[Callable[..., LossShare], int]:
        """A model's loss, and what it is divided by."""
        tokens, responses = minibatch.num_tokens, minibatch.num_responses
        if name == "critic":
            return critic_share, tokens
        return policy_share, policy_divisor(self.config, num_tokens=tokens, num_responses=responses)

    def _backward(
        self, module: nn.Module, share: Callable[..., LossShare], divisor: int, minibatch: Minibatch
    ) -> tuple[dict[str, Tensor], float]:
        """Gradients of all microbatches; sums of this rank's metrics, and the global gradient norm."""
        sums: dict[str, Tensor] = {}
        for number, microbatch in enumerate(minibatch.microbatches, 1):
            reduce_gradients(module, number == len(minibatch.microbatches), self.config.learner.reduce_gradients)
            loss, metrics = share(module, microbatch, self.config, divisor)
            loss.backward()
            for name, value in (metrics | {"loss": loss.detach()}).items():
                known = sums.get(name, torch.zeros_like(value))
                sums[name] = torch.maximum(known, value) if name == "ratio_max" else known + value
        return sums, grad_norm(module)

    def _apply(self, module: nn.Module, optimizer: Optimizer, norm: float, lr: float) -> None:
        scale_gradients(module, norm=norm, max_norm=self.config.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _require_finite(self, metrics: dict[str, float], minibatch: Minibatch, experience: Experience) -> None:
        watched = {name: value for name, value in metrics.items() if name.endswith(("/loss", "/grad_norm"))}
        if all(math.isfinite(value) for value in watched.values()):
            return
        place = {"step": self.step, "epoch": minibatch.epoch, "minibatch": minibatch.number}
        folder = self._capsules / f"step_{self.step:06d}"
        write_capsule(
            folder,
            config=self.config,
            policy=self.policy,
            critic=self.critic,
            experience=experience.rows(minibatch.rows) if minibatch.rows else None,
            facts=place
            | watched
            | {"num_tokens": minibatch.num_tokens, "num_responses": minibatch.num_responses}
            | self._progress(),
        )
        numbers = ", ".join(f"{name} {value:g}" for name, value in watched.items())
        raise DivergenceError(
            f"{', '.join(f'{name} {value}' for name, value in place.items())}: {numbers}; "
            f"this optimizer step was not taken, and `r3hf replay {folder}` runs it again"
        )

    def _adapt_prices(self, metrics: dict[str, float]) -> dict[str, float]:
        """The prices of KL and cost for the next step; returned are those of this one."""
        ppo, cost, paid = self.config.ppo, self.config.cost, {"kl/coef": self.kl_coef}
        if ppo.kl_target is not None:
            kl, responses = metrics["kl/ref/mean"], self.config.responses_per_step
            self.kl_coef = next_kl_coef(
                self.kl_coef, kl=kl, target=ppo.kl_target, horizon=ppo.kl_horizon, responses=responses
            )
        if self.config.model.cost is not None:
            mean = metrics["cost/score/mean"]
            paid |= {"cost/multiplier": self.multiplier, "cost/violation": mean - cost.limit}
            self.multiplier = next_multiplier(
                self.multiplier,
                cost=mean,
                limit=cost.limit,
                scale=self.scales[COST].scale,
                lr=cost.multiplier_lr,
                maximum=cost.max_multiplier,
            )
        return paid

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "kl_coef": self.kl_coef,
            "multiplier": self.multiplier,
            "optimizer_steps": self._optimizer_steps,
            "scales": {name: asdict(scale) for name, scale in self.scales.items()},
            "first": self.first,
            "lr_schedule": self.config.optimizer.lr_schedule,
        }

    def _modules(self) -> dict[str, nn.Module]:
        """What is trained, the policy first."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def _slowest(self) -> dict[str, float]:
        seconds = all_reduce_max(torch.tensor(list(self._seconds.values()), device=self.device)).tolist()
        return {f"time/{name}": value for name, value in zip(self._seconds, seconds, strict=True)}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start
