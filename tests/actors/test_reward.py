"""The reward actor's shell: one object for each key, whatever failed before it."""

from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from r3hf_ray.actors.reward import RewardActor
from r3hf_ray.scoring.scorer import ScoringSettings
from r3hf_ray.sections.models import ModelSection
from r3hf_ray.sections.rewards import RewardSection
from r3hf_ray.types import MAIN, Finish, GroupReport, ScoredTrajectory, Trajectory


@pytest.fixture(scope="module")
def actor(tiny_models: Any) -> RewardActor:
    model = ModelSection(policy=str(tiny_models.policy), reward_model=str(tiny_models.reward))
    return RewardActor(ScoringSettings(reward=RewardSection(), model=model, temperature=1.0))


def trajectory(prompt_id: int, sample: int, response: list[int]) -> Trajectory:
    ids = [5, 6, 7, *response]
    return Trajectory(
        prompt_id=prompt_id,
        sample=sample,
        attempt=1,
        policy_version=4,
        prompt_len=3,
        finish=Finish.EOS if response[-1] == 2 else Finish.LENGTH,
        token_ids=np.asarray(ids, np.int32),
        behavior_logprobs=np.zeros(len(ids), np.float32),
    )


def test_one_object_for_each_key_in_their_order_then_the_report(actor: RewardActor) -> None:
    """Key (1, 1) is not there, and (3, 0) is not asked for."""
    made = [trajectory(2, 0, [9, 10, 11, 2]), trajectory(3, 0, [8, 2]), trajectory(1, 0, [8, 2])]
    keys = [(1, 0), (1, 1), (2, 0)]
    first, second, third, report = actor.score(made, keys)
    assert isinstance(first, ScoredTrajectory)
    assert first.trajectory is made[2]
    assert second is None
    assert third.trajectory is made[0]
    assert isinstance(report, GroupReport)
    assert [(info.prompt_id, info.length) for info in report.infos] == [
        (2, len(made[0].token_ids)),
        (1, len(made[1].token_ids)),
    ]
    assert [info.scores for info in report.infos] == [{MAIN: third.main.score}, {MAIN: first.main.score}]
    assert report.failures == []
    assert report.seconds > 0


def test_a_failed_score_is_none_and_reported(actor: RewardActor) -> None:
    weight = actor._scorer._readers[MAIN].model.get_input_embeddings().weight
    kept = weight[30].clone()
    with torch.no_grad():
        weight[30] = float("inf")
    try:
        broken, sound, report = actor.score([trajectory(1, 0, [30, 2]), trajectory(2, 0, [9, 2])], [(1, 0), (2, 0)])
    finally:
        with torch.no_grad():
            weight[30] = kept
    assert broken is None
    assert isinstance(sound, ScoredTrajectory)
    assert [info.prompt_id for info in report.infos] == [2]
    assert [(failure.prompt_id, failure.call) for failure in report.failures] == [(1, "score")]


def test_a_chunk_of_which_nothing_was_generated(actor: RewardActor) -> None:
    nothing, report = actor.score([], [(1, 0)])
    assert nothing is None
    assert (report.infos, report.failures) == ([], [])


def test_settings_may_come_as_bytes(tiny_models: Any) -> None:
    """The coordinator starts the actor, and must not import what the settings are made of."""
    model = ModelSection(policy=str(tiny_models.policy), reward_model=str(tiny_models.reward))
    settings = ScoringSettings(reward=RewardSection(), model=model, temperature=1.0)
    *_, report = RewardActor(cloudpickle.dumps(settings)).score([trajectory(1, 0, [8, 2])], [(1, 0)])
    assert len(report.infos) == 1
