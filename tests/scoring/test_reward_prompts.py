"""Which reward models read the policy's own ids, and what the others read in their place."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from r3hf_ray.data.loading import PromptRow
from r3hf_ray.errors import DataError, ModelError
from r3hf_ray.instruments.toy.language import make_tokenizer
from r3hf_ray.models.chat import Chat
from r3hf_ray.models.chat_format import FORMAT_FILE, chat_format, save_format
from r3hf_ray.scoring.reward_prompts import Fit, measure_fit, translation_of
from r3hf_ray.scoring.translation import Translation, prompt_key

ASKED = ["Hi", "Why 5 €?", "猫"]
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %} {{ m['content'] }}<|im_end|>"
    "{% endif %}{% endfor %}"
)


def rows_of(tokenizer: PreTrainedTokenizerFast) -> list[PromptRow]:
    rows = []
    for number, content in enumerate(ASKED, start=1):
        messages = [{"role": "user", "content": content}]
        prompt = Chat(tokenizer).prompt(messages)
        rows.append(PromptRow(number, prompt.token_ids, prompt.text, messages))
    return rows


def translate(
    policy: PreTrainedTokenizerFast, own: PreTrainedTokenizerFast, folder: Path | str = "someone/reward-model"
) -> Translation | None:
    return translation_of(rows_of(policy), policy, str(folder), own, window=100)


@pytest.fixture
def other(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The policy's tokenizer again, to be changed."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=tokenizer.chat_template,
    )


def test_the_same_tokenizer_and_template_need_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    assert translate(tokenizer, other) is None
    save_format(chat_format(other), tmp_path)
    assert translate(tokenizer, other, tmp_path) is None


def test_a_template_that_renders_the_same_needs_nothing(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    other.chat_template = "{# another source #}" + str(tokenizer.chat_template)
    assert translate(tokenizer, other) is None


def test_an_added_pad_token_is_no_other_vocabulary(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    other.add_special_tokens({"pad_token": "<|pad|>"})
    assert translate(tokenizer, other) is None
    assert translate(other, tokenizer) is not None, "an id of the policy's that it does not know"


def test_a_reward_model_of_which_nothing_is_known_is_taken_as_it_is(
    tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert translate(tokenizer, plain_tokenizer) is None


def test_another_template_renders_the_dialogues_anew(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    other.chat_template = BRACKETS
    found = translate(tokenizer, other)
    assert found is not None
    texts = [other.decode(found.prompts[prompt_key(np.array(row.token_ids))]) for row in rows_of(tokenizer)]
    assert texts == ["[Hi]", "[Why 5 €?]", "[猫]"]
    assert (found.policy_before, found.before) == ("", " ")
    assert other.decode(found.end_ids) == "<|im_end|>"
    assert found.max_tokens == 99


def test_what_it_was_trained_on_is_rendered_not_what_its_tokenizer_says(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    form = {"version": 1, "chat_template": BRACKETS, "before": " ", "end": "<|im_end|>", "suffix": ""}
    (tmp_path / FORMAT_FILE).write_text(json.dumps(form))
    found = translate(tokenizer, other, tmp_path)
    assert found is not None
    assert other.decode(next(iter(found.prompts.values()))) == "[Hi]"


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A reward model's tokenizer with other ids: it knows two words, and one for all others."""
    names = ["[PAD]", "[EOS]", "[UNK]", "Hi", "Why"]
    backend = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]", pad_token="[PAD]")


def test_a_reward_model_without_a_template_reads_the_plain_form(
    tokenizer: PreTrainedTokenizerFast, words: PreTrainedTokenizerFast
) -> None:
    found = translate(tokenizer, words)
    assert found is not None
    assert (found.before, found.end_ids) == (" ", (1,))
    assert words.decode(next(iter(found.prompts.values()))) == "[UNK] [UNK] Hi [UNK] [UNK]"


def test_a_template_that_ends_nothing_ends_with_eos(
    tokenizer: PreTrainedTokenizerFast, words: PreTrainedTokenizerFast
) -> None:
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert chat_format(words).end == ""
    found = translate(tokenizer, words)
    assert found is not None
    assert found.end_ids == (1,)


def test_a_tokenizer_that_cannot_read_the_data_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"row 1: someone/reward-model cannot read this prompt .*UNK"):
        translate(tokenizer, make_tokenizer())


def test_a_prompt_that_its_template_refuses_is_named(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> None:
    money = "{% if '€' in messages[0]['content'] %}{{ raise_exception('no money') }}{% endif %}"
    other.chat_template = BRACKETS + money
    with pytest.raises(DataError, match=r"row 2: someone/reward-model cannot read this prompt .*no money"):
        translate(tokenizer, other)
    other.chat_template = "{% if '猫' not in messages[0]['content'] %}" + BRACKETS + "{% endif %}"
    with pytest.raises(DataError, match=r"row 3: someone/reward-model renders this prompt to nothing"):
        translate(tokenizer, other)


def test_the_fit_is_measured_on_the_datas_text(
    tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, words: PreTrainedTokenizerFast
) -> None:
    """Single bytes, 15 of them: two of the euro's three and one of the cat's end in no token's end but a space's."""
    rows = rows_of(tokenizer)
    same = Translation(prompts={}, policy_before="", before="", end_ids=(), max_tokens=9)
    assert measure_fit(same, rows, tokenizer, other) == Fit(loss=0.0, growth=1.0)
    assert measure_fit(replace(same, before=" "), rows, tokenizer, other) == Fit(loss=3 / 15, growth=18 / 15)
    assert measure_fit(same, rows, tokenizer, words) == Fit(loss=13 / 15, growth=5 / 15)
    with pytest.raises(ModelError, match=r"its tokenizer cannot read 'Hi' \(.*UNK"):
        measure_fit(same, rows, tokenizer, make_tokenizer())
