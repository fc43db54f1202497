"""What is left of a remote error for people."""

from typing import Any

import pytest

from r3hf_ray.errors import sentence_of


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("Traceback ...\n  File x\nKeyError: 'a'\n\n"), "KeyError: 'a'"),
        (ValueError(""), "ValueError"),
        (ValueError("r3hf_ray.actors.dispatch.RunFailed: no weights"), "no weights"),
        (ValueError("plain"), "plain"),
    ],
)
def test_the_sentence_of_an_error_is_its_last_line(error: Any, sentence: str) -> None:
    assert sentence_of(error) == sentence
