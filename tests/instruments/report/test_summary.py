"""The run at a glance."""

import pytest

from r3hf_ray.instruments.report.summary import tiles
from r3hf_ray.methods import TELESCOPING_TOLERANCE


@pytest.mark.parametrize(("factor", "tone"), [(0.9, "good"), (1.1, "bad")])
def test_the_learner_and_the_report_have_one_tolerance(factor: float, tone: str) -> None:
    (tile,) = [
        tile
        for tile in tiles(
            [{"train/global_step": 1.0, "r3hf/telescoping_error/max": factor * TELESCOPING_TOLERANCE}], []
        )
        if tile.label == "Token rewards sum to the score"
    ]
    assert tile.tone == tone
