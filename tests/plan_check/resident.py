"""`python -m plan_check.resident FOLDER RANKS`: a learner that really steps, and what the system says it holds.

Each rank makes a PPO step on rows of the longest length, as float32 on the CPU. What is compared is the peak of its
anonymous memory over what it held before it loaded a model.
"""

import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from r3hf_ray.actors.environment import KEEP_MEMORY
from r3hf_ray.config import PPOConfig
from r3hf_ray.models.sharding import make_mesh
from r3hf_ray.planning.learner_memory import largest, moments
from r3hf_ray.planning.model_shapes import ModelShape
from r3hf_ray.training.experience import RewardScale
from r3hf_ray.training.ppo import PPOLearner
from r3hf_ray.types import MAIN, Finish, ModelScores, ScoredTrajectory, Trajectory

ALLOWED = 0.20
"""Largest difference, in parts of what was measured."""
ROWS = 16
"""Of each rank."""


def job(folder: Path, ranks: int) -> PPOConfig:
    """Two forwards of 8 rows of 128 tokens, a quarter of them sampled, in one optimizer step."""
    return PPOConfig(
        run={"name": "resident", "folder": folder.parent},
        model={"policy": str(folder), "reward_model": str(folder)},
        data={"source": "x.jsonl", "max_prompt_tokens": 96},
        rollout={"prompts_per_step": ROWS * ranks, "max_response_tokens": 32},
        ppo={"microbatch_tokens": 1024, "minibatches": 1, "epochs": 1},
        critic={"init": "sft"},
        learner={"ranks": ranks},
    )


def trajectory(number: int, config: PPOConfig) -> ScoredTrajectory:
    """A row of the longest length, whose rewards add up."""
    prompt, length = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    total, nothing = prompt + length, np.zeros(prompt, np.float32)
    rewards = np.concatenate([nothing, np.full(length, 0.25, np.float32)])
    made = Trajectory(
        prompt_id=number,
        sample=0,
        attempt=0,
        policy_version=0,
        prompt_len=prompt,
        finish=Finish.LENGTH,
        token_ids=np.random.default_rng(number).integers(100, 40_000, total).astype(np.int32),
        behavior_logprobs=np.concatenate([nothing, np.full(length, -2.0, np.float32)]),
    )
    scores = ModelScores(
        token_rewards=rewards, prefix_scores=np.cumsum(rewards), score=float(rewards.sum()), prompt_score=0.0
    )
    return ScoredTrajectory(
        trajectory=made, ref_logprobs=made.behavior_logprobs, by_model={MAIN: scores}, alignment_loss=0.0
    )


def anonymous() -> int:
    """Of this process, as the system counts it. [bytes]"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def rank_main(
    rank: int, folder: Path, ranks: int, meeting: str, peaks: "multiprocessing.Queue[tuple[int, int, float]]"
) -> None:
    """A step of one rank."""
    torch.set_num_threads(1)
    config = job(folder, ranks)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    start, over, seen = anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.01):
            seen.append(max(seen.pop(), anonymous()))

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.monotonic()
    learner = PPOLearner(config, scale=RewardScale(), device="cpu", mesh=make_mesh(ranks, "cpu"))
    loaded = seen[0] - start
    rows = [trajectory(rank * ROWS + number, config) for number in range(ROWS)]
    learner.update(rows, minibatch_of=[[0] * ROWS])
    over.set()
    watching.join()
    peaks.put((seen[0] - start, loaded, time.monotonic() - began))


def main(words: list[str]) -> int:
    """Measure and compare; 1 if they are not near each other."""
    folder, ranks = Path(words[0]).resolve(), int(words[1])
    config = job(folder, ranks)
    shape = ModelShape(str(folder), "policy")
    moment, parts = largest(moments(config, shape, shape))
    os.environ.update(KEEP_MEMORY)  # as every process of a run has it
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        peaks = context.Queue()
        arguments = (folder, ranks, str(Path(scratch) / "meeting"), peaks)
        processes = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        found = [peaks.get(timeout=600) for _ in processes]
        for process in processes:
            process.join()
    measured, seconds = max(peak for peak, _, _ in found), max(one[2] for one in found)
    difference = parts.total() / measured - 1.0
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{folder.name}, {ranks} rank(s): planned {parts.total() / 2**30:.2f} GiB ({moment}), measured "
        f"{measured / 2**30:.2f} GiB: {difference:+.1%}; {seconds:.0f} s; after loading "
        f"{max(one[1] for one in found) / 2**30:.2f} GiB"
    )
    console.print("  " + ", ".join(f"{key} {size / 2**30:.2f}" for key, size in parts.items()))
    return int(not math.isfinite(difference) or abs(difference) > ALLOWED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
