"""A step's batch in one process, whatever number of ranks the system would have."""

from collections.abc import Callable

import numpy as np
import pytest

from r3hf_ray.config import PPOConfig
from r3hf_ray.draws import minibatch_of
from r3hf_ray.instruments.compare.single_process import share_of
from r3hf_ray.types import Finish, ModelScores, ScoredTrajectory, Trajectory

MakeJob = Callable[..., PPOConfig]


def scored(prompt_id: int, length: int) -> ScoredTrajectory:
    zeros = np.zeros(length, np.float32)
    trajectory = Trajectory(
        prompt_id=prompt_id,
        sample=0,
        attempt=0,
        policy_version=0,
        prompt_len=2,
        finish=Finish.EOS,
        token_ids=np.zeros(length, np.int32),
        behavior_logprobs=zeros,
    )
    main = ModelScores(token_rewards=zeros, prefix_scores=zeros, score=0.0, prompt_score=0.0)
    return ScoredTrajectory(trajectory=trajectory, ref_logprobs=zeros, by_model={"reward": main})


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_only_learner_takes_the_whole_batch(ranks: int, small_job: MakeJob) -> None:
    config = small_job("--learner.ranks", str(ranks), "--ppo.minibatches", "2")
    lengths = [9, 4, 7, 12]
    batch = [scored(prompt_id, length) for prompt_id, length in enumerate(lengths)]
    share = share_of(batch, [item.trajectory.info for item in batch], config, step=3)
    assert share.refs == batch
    assert share.minibatch_of == [
        minibatch_of(lengths, minibatches=2, seed=config.run.seed, step=3, epoch=epoch)
        for epoch in range(config.ppo.epochs)
    ]
