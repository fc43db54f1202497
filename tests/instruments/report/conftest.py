import math

import pytest

from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.metrics import METRICS
from r3hf_ray.records.samples import write_samples


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


@pytest.fixture
def make_run(token_rows):
    """`make_run(folder, texts)`: a finished run of six steps with every metric, events and samples."""

    def make(folder, texts=("Stir", " well", "\n", "<eos>"), name_of_event="warning", event_text="slow disk"):
        with JsonlLog(folder / "metrics.jsonl") as log:
            for step in range(1, 7):
                values = {name: math.sin(step + i) + 2.0 for i, name in enumerate(METRICS)}
                values["critic/explained_var"] = math.nan if step == 3 else 0.5
                log.write({"train/global_step": step, "attempt": 0, "time": 1e9 + step} | values)
        with JsonlLog(folder / "events.jsonl") as log:
            log.write({"time": 1e9, "event": "started", "versions": {"torch": "2.13.0"}})
            log.write({"time": 1e9 + 3, "event": name_of_event, "text": event_text, "step": 3})
            log.write({"time": 1e9 + 7, "event": "finished"})
        (folder / "config.toml").write_text('[ppo]\nsteps = 6\n[tracking]\nhf_token = "hunter2"\n')
        for step in (2, 6):
            write_samples(folder, step, token_rows(step, texts))
        return folder

    return make
