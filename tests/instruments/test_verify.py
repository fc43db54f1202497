"""`r3hf verify` on a sound record, and on the same with one fault planted at a time: each is found, and no other."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from r3hf_ray.actors.ledger import Ledger, State, StepLedger
from r3hf_ray.config import PPOConfig
from r3hf_ray.errors import ConfigError
from r3hf_ray.instruments.verify import CLAIMS, fingerprint_of_tensors, verify
from r3hf_ray.records.ledger import read_ledger, surviving, write_ledger
from r3hf_ray.settings import load
from r3hf_ray.types import Finish, Request, TrajectoryInfo

STEPS, PROMPTS, SAMPLES = 4, 3, 2
WEIGHTS = {"lm_head.weight": torch.arange(6.0).reshape(2, 3), "model.norm.weight": torch.ones(2)}
Plant = Callable[[Path], None]


def requests(step: int) -> list[Request]:
    prompts = range((step - 1) * PROMPTS, step * PROMPTS)
    return [
        Request(row=1, token_ids=np.array([1], np.int32), prompt_id=p, sample=s, seed=0)
        for p in prompts
        for s in range(SAMPLES)
    ]


def info(request: Request, version: int) -> TrajectoryInfo:
    ids = {"prompt_id": request.prompt_id, "sample": request.sample, "attempt": 0}
    return TrajectoryInfo(**ids, policy_version=version, prompt_len=1, length=3, finish=Finish.EOS)


def closed(step: int, *, attempt: int = 0, began_at: int = 0, again: int = 0, quarantine: int = 0) -> StepLedger:
    """A step's life: `again` samples are dispatched twice, `quarantine` given up."""
    ledger, asked = Ledger(), requests(step)
    ledger.dispatched(step, asked)
    ledger.dispatched(step, asked[:again])
    kept = asked[quarantine:]
    ledger.quarantined(step, asked[:quarantine])
    ledger.generated(step, [info(request, step - 1) for request in kept])
    ledger.scored(step, [info(request, step - 1) for request in kept])
    return ledger.close(step, [(r.prompt_id, r.sample) for r in kept], attempt=attempt, began_at=began_at)


def loads(version: int) -> list[dict[str, object]]:
    facts = {"version": version, "matched": True, "gap": 1e-7, "bound": 1e-3}
    fingerprint = fingerprint_of_tensors(WEIGHTS, "float32") if version == STEPS else f"of {version}"
    return [{"member": f"rollout {number}", "fingerprint": fingerprint, **facts} for number in range(2)]


def row(step: int, attempt: int = 0) -> str:
    values = {"train/global_step": step, "attempt": attempt, "policy/loss": 0.1, "r3hf/telescoping_error/max": 1e-7}
    return json.dumps(values) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 4 steps with one restart at step 2, one sample quarantined and one dispatched twice."""
    (tmp_path / "config.toml").write_text(
        f"""
[run]
name = "run"
[model]
policy = "p"
reward_model = "r"
[data]
source = "prompts.jsonl"
[rollout]
prompts_per_step = {PROMPTS}
samples_per_prompt = {SAMPLES}
[ppo]
steps = {STEPS}
"""
    )
    for step, attempt, began_at in ((1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 1, 2), (4, 1, 2)):
        ledger = closed(step, attempt=attempt, began_at=began_at, again=int(step == 1), quarantine=int(step == 4))
        write_ledger(tmp_path, ledger, (loads(0) if step == 1 else []) + loads(step))
    (tmp_path / "metrics.jsonl").write_text(row(1) + row(2) + row(3) + row(3, 1) + row(4, 1))
    events = [
        {"event": "restart", "step": 2, "attempt": 1, "reason": "rank 1 on node a died"},
        {"event": "finished", "step": STEPS},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "model").mkdir()
    save_file(WEIGHTS, tmp_path / "model" / "model.safetensors")
    return tmp_path


def test_a_sound_run_is_proven_line_by_line(run: Path) -> None:
    proofs = verify(run)
    assert [proof.claim for proof in proofs] == list(CLAIMS)
    assert all(proof.holds is True for proof in proofs), proofs
    assert "1 quarantined" in proofs[1].found and "1 restarts" in proofs[6].found


def test_what_a_later_attempt_took_back_is_not_on_the_line(run: Path) -> None:
    line = [(file.ledger.step, file.ledger.attempt) for file in surviving(read_ledger(run))]
    assert line == [(1, 0), (2, 0), (3, 1), (4, 1)]


def rewrite(run: Path, step: int, attempt: int, change: Callable[[dict[str, np.ndarray], list[dict]], None]) -> None:  # type: ignore[type-arg]
    """Change a step's file in place."""
    file = next(f for f in read_ledger(run) if (f.ledger.step, f.ledger.attempt) == (step, attempt))
    columns, its_loads = {name: values.copy() for name, values in file.ledger.columns.items()}, list(file.loads)
    change(columns, its_loads)
    (run / "ledger" / f"step_{step:06d}_{attempt:02d}.parquet").unlink()
    facts = {"step": step, "attempt": attempt, "began_at": file.ledger.began_at}
    write_ledger(run, StepLedger(columns=columns, **facts), its_loads)


def trained_twice(run: Path) -> None:
    def change(columns: dict[str, np.ndarray], _: object) -> None:
        last = {name: values[columns["state"] == State.TRAINED][:1] for name, values in columns.items()}
        columns |= {name: np.concatenate([values, last[name]]) for name, values in columns.items()}

    rewrite(run, 2, 0, change)


def lost(run: Path) -> None:
    def change(columns: dict[str, np.ndarray], _: object) -> None:
        kept = ~((columns["prompt_id"] == 4) & (columns["sample"] == 1) & (columns["state"] == State.TRAINED))
        columns |= {name: values[kept] for name, values in columns.items()}

    rewrite(run, 2, 0, change)


def trained_though_quarantined(run: Path) -> None:
    def change(columns: dict[str, np.ndarray], _: object) -> None:
        given_up = {name: values[columns["state"] == State.QUARANTINED] for name, values in columns.items()}
        for state in (State.SCORED, State.TRAINED):
            given_up |= {"state": np.array([state]), "version": np.array([3])}
            columns |= {name: np.concatenate([values, given_up[name]]) for name, values in columns.items()}

    rewrite(run, 4, 1, change)


def stale(run: Path) -> None:
    def change(columns: dict[str, np.ndarray], _: object) -> None:
        columns["version"][columns["state"] == State.SCORED] -= 1

    rewrite(run, 3, 1, change)


def other_weights(run: Path) -> None:
    rewrite(run, 2, 0, lambda _, its: its[1].update(matched=False))


def probe_gap(run: Path) -> None:
    rewrite(run, 2, 0, lambda _, its: its[0].update(gap=0.3))


def no_load(run: Path) -> None:
    rewrite(run, 2, 0, lambda _, its: its.clear())


def sums_off(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace("1e-07", "0.01", 1))


def a_gap(run: Path) -> None:
    (run / "ledger" / "step_000003_01.parquet").unlink()


def silent_restart(run: Path) -> None:
    path = run / "events.jsonl"
    path.write_text(path.read_text().replace("rank 1 on node a died", ""))


def another_model(run: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in WEIGHTS.items()}, run / "model" / "model.safetensors")


def no_model(run: Path) -> None:
    (run / "model" / "model.safetensors").unlink()


FAULTS: dict[Plant, str] = {
    trained_twice: "no sample was trained on twice",
    lost: "no sample was lost",
    trained_though_quarantined: "no sample was lost",
    stale: "no sample was older than rollout.max_lag allows",
    other_weights: "every sampler ran the weights it should",
    probe_gap: "every sampler ran the weights it should",
    no_load: "every sampler ran the weights it should",
    sums_off: "token rewards sum to the score",
    a_gap: "steps follow each other without a gap",
    silent_restart: "every restart has its reason",
    another_model: "model/ is the last version",
    no_model: "model/ is the last version",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(run: Path, plant: Plant) -> None:
    plant(run)
    assert [proof.claim for proof in verify(run) if proof.holds is False] == [FAULTS[plant]]


def test_what_was_not_measured_is_said_and_not_green(run: Path) -> None:
    rewrite(run, 2, 0, lambda _, its: its[0].update(matched=None, gap=None))
    found = {proof.claim: proof for proof in verify(run)}["every sampler ran the weights it should"]
    assert found.holds is None and "1 of 12 loads" in found.found


def test_an_interrupted_run_is_judged_as_far_as_it_went(run: Path) -> None:
    (run / "ledger" / "step_000004_01.parquet").unlink()
    path = run / "events.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert {proof.holds for proof in verify(run)} == {True, None}


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run \(no config.toml in it\)"):
        verify(tmp_path)


def test_a_damaged_file_is_named(run: Path) -> None:
    path = run / "ledger" / "step_000002_00.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"step_000002_00.parquet: cannot be read"):
        verify(run)


def test_sixteen_thousand_samples_cost_little(tmp_path: Path) -> None:
    ledger, count = Ledger(), 16_384
    token_ids = np.array([1], np.int32)
    asked = [Request(row=1, token_ids=token_ids, prompt_id=i // 8, sample=i % 8, seed=0) for i in range(count)]
    ledger.dispatched(1, asked)
    infos = [info(request, 0) for request in asked]
    ledger.generated(1, infos)
    ledger.scored(1, infos)
    step = ledger.close(1, [(r.prompt_id, r.sample) for r in asked], attempt=0, began_at=0)
    assert len(step.columns["state"]) == 4 * count and ledger.pending() == {}
    assert write_ledger(tmp_path, step, []).stat().st_size < 1_000_000


def test_the_job_of_the_record_loads(run: Path) -> None:
    assert load(PPOConfig, run / "config.toml", []).ppo.steps == STEPS
