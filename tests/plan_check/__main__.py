"""`make plan-check`, or `python -m plan_check MODEL RANKS [FIELD=VALUE]`: a plan beside torch's own memory tracker.

The learner's policy is sharded over a group of ranks that do not exist, on tensors without data, so that 70 billion
parameters fit anywhere; two microbatches of it are tracked. The optimizer is not: the tracker counts a sharded state as
if it were whole.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made.model_configs import write_config
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from r3hf_ray.config import PPOConfig
from r3hf_ray.models.folder import read_config
from r3hf_ray.models.logprobs import Policy
from r3hf_ray.models.sharding import DTYPES, checkpoint_activations, make_mesh, reduce_gradients, shard
from r3hf_ray.planning.learner_memory import largest, moments
from r3hf_ray.planning.model_shapes import ModelShape

ALLOWED = 0.15
"""Largest difference, in parts of what was tracked."""
GIB = 2**30


class FixedPositions(TorchFunctionMode):
    """Responses stand at fixed places: tensors without data cannot say where a mask is true."""

    def __init__(self, count: int) -> None:
        """``count`` of places."""
        super().__init__()
        self._count = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An index by a mask becomes one by numbers."""
        if function is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            flat = args[0].reshape(-1, *args[0].shape[args[1].ndim :])
            return flat.index_select(0, torch.zeros(self._count, dtype=torch.long))
        return function(*args, **(kwargs or {}))


def job(folder: Path, ranks: int, learner: dict[str, Any]) -> PPOConfig:
    """A job at the shape of jobs/hh_rlhf.toml: 32 rows of 1,024 tokens a forward, a quarter of them sampled."""
    return PPOConfig(
        run={"name": "check"},
        model={"policy": str(folder), "reward_model": str(folder)},
        data={"source": "x.jsonl", "max_prompt_tokens": 768},
        rollout={"prompts_per_step": 256 * ranks, "max_response_tokens": 256},
        ppo={"microbatch_tokens": 32768, "minibatches": 4, "advantage": "reinforce_pp"},
        learner={"ranks": ranks, "dtype": "bfloat16", "gradient_checkpointing": True, **learner},
    )


def tracked(config: PPOConfig, *, rows: int, length: int) -> tuple[int, dict[str, int]]:
    """The largest moment of two microbatches, and its parts, as the tracker sees them."""
    learner = config.learner
    mesh = make_mesh(learner.ranks, "cpu")
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(read_config(config.model.policy, "policy"), dtype=torch.float32)
        policy = Policy(model, chunk=learner.logits_chunk).eval()
        if learner.gradient_checkpointing:
            checkpoint_activations(policy)
        shard(policy, mesh, blocks=learner.shard_blocks, dtype=DTYPES[learner.dtype])
        ids, inside = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.bool)
        tracker = FSDPMemTracker(policy)
        with tracker, FixedPositions(rows * config.rollout.max_response_tokens):
            for last in (False, True):
                reduce_gradients(policy, last, learner.reduce_gradients)
                policy(ids, inside, inside, temperature=1.0).sum().backward()
                tracker.reset_mod_stats()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"], {str(kind).rpartition(".")[2]: size for kind, size in peak.items() if size}


def check(name: str, ranks: int, learner: dict[str, Any], console: Console) -> bool:
    """Print what was planned and what was tracked; whether they are near each other."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        config = job(write_config(Path(scratch), name), ranks, learner)
        found = moments(config, ModelShape(config.model.policy, "policy"), None)
        del found["evaluate"]
        for parts in found.values():
            del parts["policy optimizer"]
        moment, parts = largest(found)
        planned, middle = parts.total(), time.monotonic()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        measured, kinds = tracked(config, rows=config.ppo.microbatch_tokens // length, length=length)
    difference = planned / measured - 1.0
    said = " ".join(f"{key}={value}" for key, value in learner.items())
    console.print(
        f"{name} {said}, {ranks} ranks: planned {planned / GIB:.2f} GiB ({moment}), tracked {measured / GIB:.2f} GiB: "
        f"{difference:+.1%}; {middle - start:.0f} s and {time.monotonic() - middle:.0f} s"
    )
    for one in (parts, kinds):
        console.print("  " + ", ".join(f"{key} {size / GIB:.2f}" for key, size in one.items()))
    return abs(difference) <= ALLOWED


def main(words: list[str]) -> int:
    """One case: a model, ranks, and settings of the learner (`gradient_checkpointing=false`)."""
    name, ranks, *given = words
    learner = dict(word.split("=") for word in given)
    console = Console(soft_wrap=True, highlight=False)
    return int(not check(name, int(ranks), learner, console))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
