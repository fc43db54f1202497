import pytest

from r3hf_ray.algorithms.spans import ends_sentence


@pytest.mark.parametrize("text", [".", " done.", "?!", "\n", "so.\n\n", "end. "])
def test_what_ends_a_sentence(text: str) -> None:
    assert ends_sentence(text)


@pytest.mark.parametrize("text", ["", " ", "3.14", "Mr", ",", "\ufffd", "<eos>"])
def test_what_does_not(text: str) -> None:
    assert not ends_sentence(text)
