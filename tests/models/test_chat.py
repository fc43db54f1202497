"""One rendering for all stages, and a reward model remembers its own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from r3hf_ray.errors import DataError, Unusable
from r3hf_ray.instruments.toy.language import make_tokenizer
from r3hf_ray.models.chat import Chat, pooling_suffix
from r3hf_ray.models.chat_format import FORMAT_FILE, ChatFormat, chat_format, save_format, trained_format
from r3hf_ray.types import Message

ASKED: list[Message] = [{"role": "user", "content": "Hi"}]
END = 2


def test_prompt_and_answer_are_what_the_template_renders(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat(tokenizer)
    form, prompt = chat.form, chat.prompt(ASKED)
    assert (form.before, form.end, form.suffix) == ("", "<|im_end|>", "\n")
    assert prompt.text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    whole = [*ASKED, {"role": "assistant", "content": "Yes"}]
    ids = prompt.token_ids + chat.answer(prompt, " Yes\n")
    rendered = tokenizer.apply_chat_template(whole, tokenize=False)
    assert ids + tokenizer.encode(form.suffix) == tokenizer.encode(rendered, add_special_tokens=False)


def test_an_answer_ends_once(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat(tokenizer)
    prompt = chat.prompt(ASKED)
    ids = chat.answer(prompt, "Yes<|im_end|>")
    assert ids == chat.answer(prompt, "Yes")
    assert ids.count(END) == 1
    assert ids[-1] == END


@pytest.mark.parametrize("text", ["", "  \n", "<|im_end|>"])
def test_an_empty_answer_is_unusable(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(Unusable, match="empty answer"):
        Chat(tokenizer).answer(Chat(tokenizer).prompt(ASKED), text)


def test_without_a_template_dialogues_are_plain(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    turns: list[Message] = [*ASKED, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "More"}]
    chat = Chat(plain_tokenizer)
    prompt = chat.prompt(turns)
    assert prompt.text == "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: More\n\nAssistant:"
    ids = chat.answer(prompt, "Sure")
    assert plain_tokenizer.decode(ids) == " Sure<|im_end|>"


def test_a_template_that_ends_nothing_leaves_the_end_to_the_answer() -> None:
    toy = make_tokenizer()
    chat = Chat(toy)
    assert chat.form.end == ""
    prompt = chat.prompt([{"role": "user", "content": "baking no-jokes politely"}])
    cut, whole = (chat.answer(prompt, text) for text in ("um .", "um . <eos>"))
    assert whole == [*cut, toy.eos_token_id]


def test_a_refusing_template_makes_the_row_unusable(tokenizer: PreTrainedTokenizerFast) -> None:
    picky = make_tokenizer()
    picky.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(Unusable, match="roles must alternate"):
        Chat(picky).prompt(ASKED * 3)


def test_a_reward_model_remembers_its_format(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_format(chat_format(tokenizer), tmp_path)
    record = json.loads((tmp_path / FORMAT_FILE).read_text())
    assert record["end"] == "<|im_end|>"
    assert record["pooling"] == "last answer token"
    assert trained_format(str(tmp_path), tokenizer) == replace(chat_format(tokenizer), suffix="")
    assert pooling_suffix(str(tmp_path), tokenizer, "auto") == []


def test_what_a_reward_model_was_trained_on_wins_over_its_tokenizer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    (folder := tmp_path / "trained").mkdir()
    save_format(chat_format(tokenizer), folder)
    assert trained_format(str(folder), plain_tokenizer).chat_template == tokenizer.chat_template
    assert trained_format(str(tmp_path), tokenizer) == chat_format(tokenizer)
    assert trained_format(str(tmp_path), plain_tokenizer) is None, "nothing is known of it"


def test_a_foreign_reward_model_pools_on_its_template_suffix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    newline = tokenizer.encode("\n")
    assert pooling_suffix(str(tmp_path), tokenizer, "auto") == newline
    assert pooling_suffix(str(tmp_path), plain_tokenizer, "auto") == []
    assert pooling_suffix(str(tmp_path), tokenizer, "none") == []
    assert pooling_suffix(str(tmp_path), tokenizer, "\n\n") == newline * 2


def test_a_broken_format_file_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / FORMAT_FILE).write_text(json.dumps({"version": 1, "suffix": ""}))
    with pytest.raises(DataError, match="not a version 1 format file"):
        trained_format(str(tmp_path), tokenizer)


def test_space_before_the_answer_is_read_off_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    spaced = make_tokenizer()
    spaced.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} "
        "{{ m['content'] }} <eos>{% endif %}{% endfor %}"
    )
    assert chat_format(spaced) == ChatFormat(spaced.chat_template, " ", "<eos>", "", gap=" ")
