"""The folder of a finished run, with every metric, for what reads one."""

import math

import pytest

from r3hf_ray.records.jsonl import JsonlLog
from r3hf_ray.records.metrics import METRICS
from r3hf_ray.records.samples import write_samples


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
