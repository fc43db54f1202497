"""Rows of a dump of samples, as rank 0 writes them."""

import pytest


def _token(step, prompt_id, position, text):
    reward = (-1) ** position * 0.25 * (position + 1)
    return {
        "step": step,
        "prompt_id": prompt_id,
        "sample": 0,
        "position": position,
        "token_id": 7 + position,
        "token": text,
        "prompt": "how do I <b>cook</b>?",
        "reward": reward,
        "kl": 0.125,
        "value": 0.5,
        "advantage": reward - 0.5,
        "prefix_score": reward,
        "logprob": -1.5,
        "score": float(prompt_id),
        "prompt_score": -0.5,
        "gold": None,
        "gold_credit": None,
        "finish": "eos",
    }


@pytest.fixture
def token_rows():
    """`token_rows(step, texts)`: sample rows of two responses with these token texts."""

    def rows(step, texts=("Stir", " well", "\n", "<eos>")):
        return [_token(step, prompt_id, i, text) for prompt_id in (4, 5) for i, text in enumerate(texts)]

    return rows
