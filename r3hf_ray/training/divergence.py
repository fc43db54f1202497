"""A capsule of a diverged minibatch: written before the step that would have spoilt the weights, replayed on CPU."""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import r3hf_ray
from r3hf_ray.algorithms.batching import Batch, BatchScores, microbatches, tensors_of
from r3hf_ray.config import PPOConfig
from r3hf_ray.models.logprobs import Policy
from r3hf_ray.models.sharding import DTYPES, full_parameters, grad_norm, rank, shard
from r3hf_ray.models.values import Critic
from r3hf_ray.training.experience import Experience
from r3hf_ray.training.ppo_losses import LossShare, critic_share, policy_divisor, policy_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a minibatch gives when it is run again."""

    policy_loss: float
    critic_loss: float
    """0 where there is no critic; so is its norm."""
    policy_grad_norm: float
    critic_grad_norm: float
    non_finite: list[str]
    """Names of tensors with NaN or infinity, in the order of computation: the first is the cause."""


def write_capsule(
    folder: Path,
    *,
    config: PPOConfig,
    policy: Policy,
    critic: Critic | None,
    experience: Experience | None,
    facts: dict[str, Any],
) -> None:
    """Write what reruns a minibatch. All ranks call it: parameters are gathered, rank 0 writes them.

    Args:
        folder: where; made if needed, shared by all ranks.
        config: of the run.
        policy: before the optimizer step.
        critic: before the optimizer step; None where advantages need none.
        experience: this rank's rows of the minibatch; None if it has none.
        facts: step, epoch, minibatch, num_tokens, num_responses and whatever else helps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if experience is not None:
        contiguous = {name: x.cpu().contiguous().clone() for name, x in tensors_of(experience).items()}
        save_file(contiguous, folder / f"batch_rank_{rank():05d}.safetensors")
    models: list[tuple[str, nn.Module, Any]] = [("policy", policy, policy.model)]
    models += [] if critic is None else [("critic", critic, critic.trunk)]
    for name, module, model in models:
        parameters = {key: value.clone() for key, value in full_parameters(module) if rank() == 0}
        if rank() == 0:
            model.config.save_pretrained(folder / name)
            save_file(parameters, folder / name / "parameters.safetensors")
    if rank() == 0:
        versions = {"r3hf_ray": r3hf_ray.__version__, "python": platform.python_version()}
        content = {
            **facts,
            "seed": config.run.seed,
            "versions": versions | {"torch": torch.__version__, "transformers": transformers.__version__},
            "config": config.model_dump(mode="json"),
        }
        (folder / "capsule.json").write_text(json.dumps(content, indent=2))


def replay_capsule(folder: Path) -> Replay:
    """Run a capsule's minibatch again on CPU, forward and backward, and say which tensors are not finite.

    With learner.dtype = bfloat16 this opens a process group of one rank, as FSDP2 casts within one.

    Raises:
        FileNotFoundError: the folder holds no capsule.
    """
    content = json.loads((folder / "capsule.json").read_text())
    config = PPOConfig(**content["config"])
    tokens, responses = content["num_tokens"], content["num_responses"]
    model = AutoModelForCausalLM.from_config(_config(folder / "policy"), dtype=torch.float32)
    policy = Policy(model, chunk=config.learner.logits_chunk)
    models: dict[str, tuple[Policy | Critic, Callable[..., LossShare], int]] = {
        "policy": (policy, policy_share, policy_divisor(config, num_tokens=tokens, num_responses=responses))
    }
    if config.has_critic:
        critic = Critic(AutoModel.from_config(_config(folder / "critic"), dtype=torch.float32))
        models["critic"] = (critic, critic_share, tokens)
    rows = {path.stem: _experience(load_file(path)) for path in sorted(folder.glob("batch_rank_*.safetensors"))}
    given = [(f"{file}: {name}", x) for file, part in rows.items() for name, x in tensors_of(part).items()]
    suspects = [name for name, x in given if not _finite(x)]
    losses, norms = dict.fromkeys(("policy", "critic"), 0.0), dict.fromkeys(("policy", "critic"), 0.0)
    for name, (model, share, divisor) in models.items():
        parameters = load_file(folder / name / "parameters.safetensors")
        model.load_state_dict(parameters, strict=False)  # a tied lm_head is stored once
        suspects += [f"{name} parameter: {key}" for key, x in parameters.items() if not _finite(x)]
        keep = model.head if isinstance(model, Critic) else None
        shard(model.eval(), None, blocks="never", dtype=DTYPES[config.learner.dtype], keep_float32=keep)
        losses[name] = sum(_backward(model, share, part, config, divisor) for part in rows.values())
        norms[name] = grad_norm(model)
        suspects += [] if _finite(torch.tensor(losses[name])) else [f"{name} loss"]
        gradients = ((key, p.grad) for key, p in model.named_parameters() if p.grad is not None)
        suspects += [f"{name} gradient: {key}" for key, gradient in gradients if not _finite(gradient)]
    return Replay(
        policy_loss=losses["policy"],
        critic_loss=losses["critic"],
        policy_grad_norm=norms["policy"],
        critic_grad_norm=norms["critic"],
        non_finite=suspects,
    )


def _backward(
    model: nn.Module, share: Callable[..., LossShare], experience: Experience, config: PPOConfig, divisor: int
) -> float:
    total = 0.0
    for index in microbatches(experience.batch.lengths, budget_tokens=config.ppo.microbatch_tokens):
        loss, _ = share(model, experience.rows(index), config, divisor)
        loss.backward()
        total += float(loss.detach())
    return total


def _experience(tensors: dict[str, Tensor]) -> Experience:
    """What `tensors_of` took apart."""
    whole: dict[str, Any] = {}
    for place, tensor in tensors.items():
        inside, names = whole, place.split(".")
        for name in names[:-1]:
            inside = inside.setdefault(name, {})
        inside[names[-1]] = tensor
    by_model = {name: BatchScores(**scores) for name, scores in whole["batch"].pop("by_model").items()}
    return Experience(**(whole | {"batch": Batch(**whole["batch"], by_model=by_model)}))


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder)


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
