"""Nothing is skipped in silence: what is left out is counted and listed, what cannot be read stops the run."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from r3hf_ray.data.loading import is_ranked, load_examples, load_groups, load_pairs, load_prompts
from r3hf_ray.errors import DataError
from r3hf_ray.instruments.toy.language import make_tokenizer
from r3hf_ray.sections.data import DataSection

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_base.jsonl.gz"
real_data = pytest.mark.skipif(not HH.exists(), reason="the real HH-RLHF sample is not beside this checkout")
END = 2


def pair(n: int, chosen: str = "Yes", rejected: str = "No") -> dict[str, Any]:
    return {"prompt": f"q{n}", "chosen": chosen, "rejected": rejected}


def section(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> DataSection:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(source=str(path), **fields)


def test_pairs_are_ids_with_one_end_each(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = load_pairs(section(tmp_path, [pair(1)]), tokenizer, max_tokens=100)
    (one,) = loaded.train
    assert tokenizer.decode(one.prompt_ids) == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(one.chosen_ids) == "Yes<|im_end|>"
    assert tokenizer.decode(one.rejected_ids) == "No<|im_end|>"
    assert one.chosen_ids[-1] == END
    assert one.as_group().sequences[1] == one.prompt_ids + one.rejected_ids


def test_all_commands_render_the_same_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = section(tmp_path, [pair(1)])
    prompt = load_prompts(data, tokenizer).train[0]
    assert prompt.row == 1
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert load_pairs(data, tokenizer, max_tokens=100).train[0].prompt_ids == prompt.token_ids
    example = load_examples(data, tokenizer, max_tokens=100).train[0]
    assert (example.prompt_ids, tokenizer.decode(example.answer_ids)) == (prompt.token_ids, "Yes<|im_end|>")


def test_what_is_left_out_is_listed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        pair(1),
        pair(2, chosen=" "),
        pair(3, rejected="x" * 100),
        pair(4),
        {**pair(5), "prompt": "y" * 60},
        pair(6),
    ]
    loaded = load_pairs(section(tmp_path, rows, max_prompt_tokens=60), tokenizer, max_tokens=80)
    assert loaded.report.left_out == {"empty answer": [2], "over 80 tokens": [3], "prompt over 60 tokens": [5]}
    assert len(loaded.train) == loaded.report.used == 3
    assert str(loaded.report).endswith(
        "rows.jsonl: 3 of 6 rows used; left out: 1 empty answer (line 2), 1 over 80 tokens (line 3), "
        "1 prompt over 60 tokens (line 5)"
    )


def test_a_long_list_is_cut_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(0), *(pair(n, chosen="") for n in range(30))]
    report = load_pairs(section(tmp_path, rows), tokenizer, max_tokens=80).report
    assert "30 empty answer (lines 2, 3, 4, " in str(report)
    assert str(report).endswith("21 and 10 more)")


def test_a_limit_that_is_not_reached_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(n) for n in range(5)]
    reports = {
        n: str(load_pairs(section(tmp_path, rows, skip=1, limit=n), tokenizer, max_tokens=80).report) for n in (4, 9)
    }
    assert reports[9].endswith("4 of 5 rows used, fewer than the limit of 9")
    assert reports[4].endswith("4 of 5 rows used")


def test_skip_limit_and_heldout_count_usable_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(n, chosen="" if n == 2 else "Yes") for n in range(10)]
    data = section(tmp_path, rows, skip=1, limit=5, heldout=2)
    loaded = load_pairs(data, tokenizer, max_tokens=100)
    order = [tokenizer.decode(p.prompt_ids).split("<")[1][-2:] for p in [*loaded.train, *loaded.heldout]]
    assert order == ["q1", "q3", "q4", "q5", "q6"]
    assert (len(loaded.train), len(loaded.heldout), loaded.report.read) == (3, 2, 7)


def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def refused(rows: list[dict[str, Any]], **fields: Any) -> str:
        with pytest.raises(DataError) as error:
            load_pairs(section(tmp_path, rows, **fields), tokenizer, max_tokens=100)
        return str(error.value).partition("rows.jsonl: ")[2]

    unusable = [pair(n, "") for n in range(3)]
    usable = [pair(n) for n in range(5)]
    assert (
        refused(usable, heldout=8)
        == "none of its 5 rows (read as data.format preference) is left: 5 held out (lower data.heldout)"
    )
    assert refused(usable, skip=4, heldout=1) == (
        "none of its 5 rows (read as data.format preference) is left: 4 skipped (lower data.skip), "
        "1 held out (lower data.heldout)"
    )
    empty = "3 empty answer (lines 1, 2, 3)"
    assert (
        refused(unusable) == "none of its 3 rows (read as data.format preference) is left: 3 empty answer (all of them)"
    )
    assert refused([*unusable, pair(1)], heldout=1) == (
        f"none of its 4 rows (read as data.format preference) is left: {empty}, 1 held out (lower data.heldout)"
    )
    assert refused([*unusable, *usable[:2], *[pair(1, "Yes")] * 4], heldout=4, skip=1) == (
        f"none of its 9 rows (read as data.format preference) is left: 4 held out (lower data.heldout), {empty}, "
        '1 with a prompt that is held out (data.split_by = "row" keeps them) (line 5), 1 skipped (lower data.skip)'
    )
    assert refused([], heldout=1, format="preference") == "holds no rows"


def test_no_prompt_is_both_trained_on_and_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(n % 5, chosen=f"Yes {n}") for n in range(10)] + [{**pair(9), "prompt": " q0 "}]
    loaded = load_pairs(section(tmp_path, rows, heldout=2), tokenizer, max_tokens=100)
    assert (len(loaded.train), len(loaded.heldout)) == (6, 2)
    assert not {tuple(p.prompt_ids) for p in loaded.train} & {tuple(p.prompt_ids) for p in loaded.heldout}
    assert str(loaded.report).endswith(
        "8 of 11 rows used, 2 of them held out; left out: "
        '3 with a prompt that is held out (data.split_by = "row" keeps them) (lines 1, 5, 6)'
    )
    prompts = load_prompts(section(tmp_path, rows, heldout=2), tokenizer)
    assert [row.row for row in prompts.train] == [2, 3, 4, 7, 8, 9]
    both = load_pairs(section(tmp_path, rows, heldout=2, split_by="row"), tokenizer, max_tokens=100)
    assert (len(both.train), len(both.heldout)) == (9, 2)
    assert str(both.report).endswith(
        "11 of 11 rows used, 2 of them held out; 3 of the others share a prompt with them, as data.split_by = row lets "
        "them"
    )


def test_rows_that_teach_nothing_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair(1), pair(2, " No\r\n", "No"), pair(3) | {"winner": "tie"}, pair(4, "No<|im_end|>", "No")]
    data = section(tmp_path, rows)
    loaded = load_pairs(data, tokenizer, max_tokens=100)
    assert len(loaded.train) == 1
    assert loaded.report.left_out == {"equal answers": [2, 4], "stated tie": [3]}
    assert len(load_prompts(data, tokenizer).train) == 4, "their prompts are as good as others"
    answers = [{"answer": text, "rank": rank} for rank, text in enumerate(("Yes", "No", "No", "No "))]
    rows = [{"prompt": "q", "answers": answers}, {"prompt": "q", "answers": answers[1:]}]
    ranked = load_groups(section(tmp_path, rows), tokenizer, max_tokens=100)
    assert [group.pairs for group in ranked.train] == [[(0, 1), (0, 2), (0, 3)]]
    assert ranked.report.left_out == {"equal answers": [2]}


def test_a_weight_that_is_not_used_is_said(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    report = load_pairs(section(tmp_path, [pair(1) | {"margin": 2.0}]), tokenizer, max_tokens=100).report
    assert str(report).endswith("1 of 1 rows used; not used: the column margin")


def test_prompts_hold_no_preference(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for load in (load_pairs, load_groups):
        with pytest.raises(DataError, match=r"2 rows \(.* prompt\) is left: 2 no preference stated \(all of them\)"):
            load(section(tmp_path, [{"prompt": "q"}, {"prompt": "r"}]), tokenizer, max_tokens=100)


def test_a_ranking_gives_one_pair(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The first preference between answers that differ: pairs stay independent of each other."""
    row = {"prompt": "q", "responses": ["No", "No", "Yes"], "pairs": [[0, 1], [2, 1], [2, 0]]}
    (pair,) = load_pairs(section(tmp_path, [row]), tokenizer, max_tokens=100).train
    assert [tokenizer.decode(ids) for ids in (pair.chosen_ids, pair.rejected_ids)] == ["Yes<|im_end|>", "No<|im_end|>"]


def test_an_exception_of_a_template_or_tokenizer_is_one_sentence_with_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = section(tmp_path, [pair(1), pair(2)])
    read = type(tokenizer).__call__

    def broken(self: PreTrainedTokenizerFast, text: str, **settings: Any) -> Any:
        if "q2" in text:
            raise RuntimeError("no such piece\n\ud83d")
        return read(self, text, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", broken)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: cannot be turned into tokens \(RuntimeError: \\ud83d\); cor"):
        load_prompts(data, tokenizer)


def test_an_unreadable_row_stops_with_its_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = section(tmp_path, [pair(1), {"prompt": "x", "chosen": 3, "rejected": "y"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: is not shaped as data\.format preference"):
        load_pairs(data, tokenizer, max_tokens=100)
    row = {"prompt": "q", "responses": ["a", "b"]}
    data = section(tmp_path, [{**row, "scores": [1, 0]}, {**row, "scores": ["high", 1]}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: is not shaped as data\.format ranked: a score is 'high'"):
        load_groups(data, tokenizer, max_tokens=100)


def test_ranked_groups_keep_every_preference(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "q", "responses": ["a", "b", "c"], "pairs": [[2, 0], [2, 1]]}
    data = section(tmp_path, [row, {**row, "pairs": []}])
    assert is_ranked(data)
    loaded = load_groups(data, tokenizer, max_tokens=100)
    (group,) = loaded.train
    assert group.pairs == [(2, 0), (2, 1)]
    assert [tokenizer.decode(ids)[-11:] for ids in group.sequences] == [f"{letter}<|im_end|>" for letter in "abc"]
    answers = [tokenizer.decode(ids[group.prompt_tokens :]) for ids in group.sequences]
    assert answers == [f"{letter}<|im_end|>" for letter in "abc"]
    assert loaded.report.left_out == {"no preference stated": [2]}
    assert tokenizer.decode(load_examples(data, tokenizer, max_tokens=100).train[0].answer_ids) == "c<|im_end|>"


def test_pairs_are_not_ranked(tmp_path: Path) -> None:
    assert not is_ranked(section(tmp_path, [pair(1)]))


def test_prompts_alone_cannot_be_imitated(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError,
        match=r"none of its 1 rows \(read as data.format prompt\) is left: 1 no answer to learn from \(line 1\)",
    ):
        load_examples(section(tmp_path, [{"prompt": "q"}]), tokenizer, max_tokens=100)


def test_answers_that_never_end_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "baking no-jokes politely", "chosen": "um .", "rejected": "well ."}]
    with pytest.raises(DataError, match="no answer ends with '<eos>'"):
        load_examples(section(tmp_path, rows), make_tokenizer(), max_tokens=100)


@real_data
def test_real_pairs(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    data = DataSection(source=str(HH), max_prompt_tokens=100_000)
    report = load_pairs(data, plain_tokenizer, max_tokens=100_000).report
    assert report.left_out == {"no shared prompt": [662, 1030], "empty answer": [1481, 1506]}
    assert (report.read, report.used) == (1600, 1596)
    prompts = load_prompts(data, plain_tokenizer)
    assert len(prompts.train) == 1598
    assert prompts.train[0].text == (
        "\n\nHuman: You wish you could be a robot.\n\nAssistant: Why do you say that?"
        "\n\nHuman: Because you’re stuck being a human assistant.\n\nAssistant:"
    )
