"""What ends a group's thread is never lost."""

from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError

from r3hf_ray.actors.train_group import TrainGroup


def ended(fit: Callable[[], None]) -> TrainGroup:
    """A group whose `fit` has ended."""
    group = TrainGroup(fit)
    group.start()
    group.join(10.0)
    assert not group.is_alive()
    return group


@pytest.mark.parametrize("error", [ActorDiedError(), KeyError("controller"), SystemExit(1)])
def test_whatever_ends_a_group_is_kept(error: BaseException) -> None:
    """A controller that is killed is no `TrainingFailedError`; a command that knew only those said it was finished."""

    def fit() -> None:
        raise error

    assert ended(fit).error is error


def test_a_group_that_came_to_its_end_has_no_error() -> None:
    assert ended(lambda: None).error is None
