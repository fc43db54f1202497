import math

import pyarrow.parquet as pq
import pytest

from r3hf_ray.records.samples import read_samples, sample_steps, write_samples


def test_rows_come_back_grouped_by_response(tmp_path, token_rows):
    rows = token_rows(10)
    path = write_samples(tmp_path, 10, rows)
    assert path == tmp_path / "samples" / "step_000010.parquet"
    first, second = read_samples(tmp_path, 10)
    assert first + second == rows


def test_gold_may_be_missing_and_rows_may_be_shuffled(tmp_path, token_rows):
    missing = ("gold", "gold_credit", "step")
    rows = [{key: value for key, value in row.items() if key not in missing} for row in token_rows(3)]
    write_samples(tmp_path, 3, rows[::-1])
    responses = read_samples(tmp_path, 3)
    assert [[row["position"] for row in response] for response in responses] == [[0, 1, 2, 3]] * 2
    assert {(row["gold"], row["step"]) for response in responses for row in response} == {(None, 3)}


def test_parts_of_the_reward_are_further_columns(tmp_path, token_rows):
    rows = [row | {"reward/reward": 0.5, "reward/cost": -0.25 * row["position"]} for row in token_rows(2)]
    write_samples(tmp_path, 2, rows)
    first, second = read_samples(tmp_path, 2)
    assert first + second == rows
    del rows[1]["reward/cost"]
    with pytest.raises(KeyError, match="reward/cost"):
        write_samples(tmp_path, 2, rows)


def test_a_number_that_is_not_finite_survives(tmp_path, token_rows):
    rows = token_rows(1)
    rows[0]["kl"] = math.inf
    write_samples(tmp_path, 1, rows)
    assert read_samples(tmp_path, 1)[0][0]["kl"] == math.inf


def test_what_an_older_dump_lacks_is_null(tmp_path, token_rows):
    path = write_samples(tmp_path, 3, token_rows(3))
    pq.write_table(pq.read_table(path).drop_columns(["prompt_score", "gold_credit"]), path)
    first, second = read_samples(tmp_path, 3)
    absent = {"prompt_score": None, "gold_credit": None}
    assert first + second == [row | absent for row in token_rows(3)]


def test_a_missing_column_is_an_error(tmp_path, token_rows):
    rows = token_rows(1)
    del rows[1]["advantage"]
    with pytest.raises(KeyError, match="advantage"):
        write_samples(tmp_path, 1, rows)


def test_steps_are_found_in_order_and_a_second_dump_replaces_the_first(tmp_path, token_rows):
    assert sample_steps(tmp_path) == []
    for step, texts in ((20, ("a",)), (3, ("b",)), (20, ("c",))):
        write_samples(tmp_path, step, token_rows(step, texts))
    assert sample_steps(tmp_path) == [3, 20]
    assert read_samples(tmp_path, 20)[0][0]["token"] == "c"
    assert not list((tmp_path / "samples").glob("*.tmp"))
