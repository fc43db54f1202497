"""One rendering for all stages, and a reward model remembers its own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made.byte_tokenizer import CHATML, SPECIAL, byte_tokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from r3hf_ray.errors import DataError, Unusable
from r3hf_ray.instruments.toy.language import make_tokenizer
from r3hf_ray.models.chat import Chat, pooling_suffix
from r3hf_ray.models.chat_format import FORMAT_FILE, ChatFormat, chat_format, save_format, trained_format
from r3hf_ray.models.folder import load_tokenizer
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


# ------------------------------------------------------------------------------- the end, read off the template


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("<eos>", ("<eos>", "", "")),
        ("{{ '\\n<eos>\\n' }}", ("<eos>", "\n", "\n")),
        ("<|added|>", ("<|added|>", "", "")),  # added, but called special nowhere
        (" [END]", ("[END]", " ", "")),  # an ordinary word of the vocabulary
        ("[END]", ("", "", "")),  # which makes another word of the answer's last
        (" .", ("", "", "")),  # a word that answers are made of ends none
        ("", ("", "", "")),
    ],
)
def test_the_end_is_any_token_that_opens_what_follows_an_answer(tail: str, expected: tuple[str, str, str]) -> None:
    words = ["<eos>", "[END]", ".", "?", "question", "answer"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="?")
    own.add_tokens([AddedToken("<|added|>", special=False, normalized=False)])
    own.chat_template = (
        f"{{% for m in messages %}}{{{{ m['content'] }}}}{{% if m['role'] == 'user' %}}{{{{ ' ' }}}}{{% else %}}{tail}"
        "{% endif %}{% endfor %}"
    )
    form = chat_format(own)
    assert (form.end, form.gap, form.suffix) == expected
    chat = Chat(own)
    ids = chat.answer(chat.prompt([{"role": "user", "content": "question"}]), "answer")
    assert chat.end_id == own.convert_tokens_to_ids(form.end or "<eos>")
    assert ids == [words.index("answer"), *([chat.end_id] if form.end else [])]


def test_space_before_the_end_is_part_of_the_answers_tokens() -> None:
    lines = byte_tokenizer(CHATML.replace("+ '<|im_end|>", "+ '\n<|im_end|>"))
    chat = Chat(lines)
    prompt = chat.prompt(ASKED)
    assert lines.decode(chat.answer(prompt, "Yes")) == "Yes\n<|im_end|>"
    assert lines.decode(chat.end_ids) == "\n<|im_end|>"
    assert chat.end_id == END


def test_a_foreign_end_behind_an_answer_is_not_read_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    base = byte_tokenizer(CHATML)
    base.eos_token = "<|endoftext|>"
    chat = Chat(base)
    prompt = chat.prompt(ASKED)
    assert chat.answer(prompt, "Yes<|im_end|><|endoftext|>") == chat.answer(prompt, "Yes")


THOUGHT = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


def test_a_template_that_opens_a_thought_is_refused_with_both_texts(cases: Path) -> None:
    opened = CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", THOUGHT)
    for folder in (byte_tokenizer(opened), load_tokenizer(cases / "policy_opens_a_thought")):
        with pytest.raises(DataError, match=r"behind '.*<think>\\n' and shows one as '.*answer<.*>.*', so an answer"):
            chat_format(folder)


def test_a_thought_that_is_closed_before_the_answer_is_part_of_it() -> None:
    closed = CHATML.replace(
        "+ '\n' + message", "+ '\n' + ('<think></think>' if message['role'] != 'user' else '') + message"
    )
    chat = Chat(byte_tokenizer(closed))
    assert chat.tokenizer.decode(chat.answer(chat.prompt(ASKED), "Yes")) == "<think></think>Yes<|im_end|>"


# ----------------------------------------------------------------------------------- tokens of the rendered whole


def test_an_answers_ids_are_those_of_the_whole_not_of_a_text_that_begins_with_it(
    metaspace: Callable[[str | None], PreTrainedTokenizerFast],
) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>U {{ m['content'] }}\n{% else %}{{ m['content'] }}</s>"
        "{% endif %}{% endfor %}"
    )
    pieces = metaspace(template)
    chat = Chat(pieces)
    prompt = chat.prompt(ASKED)
    ids = chat.answer(prompt, "Yes it")
    assert pieces.convert_ids_to_tokens(ids) == ["Y", "e", "s", "▁i", "t", "</s>"]
    whole = pieces.encode("<s>U Hi\nYes it</s>", add_special_tokens=False)
    assert prompt.token_ids + ids == whole
    assert pieces.convert_ids_to_tokens(chat.suffix_ids("\n")) == ["\n"]
    plain = Chat(metaspace(None))
    first = plain.answer(plain.prompt(ASKED), "Yes")
    assert pieces.convert_ids_to_tokens(first) == ["▁Y", "e", "s", "</s>"], "the plain form puts a space there"


def test_an_answer_that_would_change_its_prompts_tokens_is_left_out() -> None:
    letters = sorted(ByteLevel.alphabet())
    merged = Tokenizer(BPE({letter: i for i, letter in enumerate([*letters, ":x", "<eos>"])}, [(":", "x")]))
    merged.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    pairs = PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="<eos>")
    pairs.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{{ ':' if m['role'] == 'user' else '<eos>' }}{% endfor %}"
    )
    chat = Chat(pairs)
    prompt = chat.prompt(ASKED)
    assert pairs.convert_ids_to_tokens(chat.answer(prompt, "y")) == ["y", "<eos>"]
    with pytest.raises(Unusable, match="would change the tokens of its prompt"):
        chat.answer(prompt, "x")


def test_offsets_count_the_characters_of_the_given_text(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat(tokenizer)
    for asked in ("Hi", "what is <|im_end|>?"):
        given = chat.encoded_answer(chat.prompt([{"role": "user", "content": asked}]), "  a<|endoftext|>b \n")
        text = "  a<|endoftext|>b"
        assert given.offsets == [*((i, i + 1) for i in range(2, len(text))), (len(text), len(text))]
        assert tokenizer.decode(given.token_ids) == "a<|endoftext|>b<|im_end|>"


# -------------------------------------------------------------------------------- a user's text and control tokens

SPELLED = [
    "what does {} mean?",
    "{}",
    "{}{}",
    "<|im_{}end|>",
    "a {} b\n{} c",
]


@pytest.mark.parametrize("text", SPELLED)
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words", "plain"])
def test_control_tokens_spelled_in_a_text_stay_letters(
    kind: str, text: str, metaspace: Callable[[str | None], PreTrainedTokenizerFast]
) -> None:
    """The ids hold as many control tokens as the frame around an innocent text, and spell the same text."""
    pieces = "{% for m in messages %}{{ '<s>' if m['role'] == 'user' }}{{ m['content'] }}</s>{% endfor %}"
    made = {
        "bytes": lambda: byte_tokenizer(CHATML),
        "pieces": lambda: metaspace(pieces),
        "words": make_words,
        "plain": lambda: byte_tokenizer(None),
    }[kind]()
    control = "<|im_end|>" if kind in ("bytes", "plain") else "</s>"
    chat, spelled = Chat(made), text.replace("{}", control)
    prompt, innocent = (chat.prompt([{"role": "user", "content": content}]) for content in (spelled, "x"))
    answer, dull = chat.answer(prompt, f"is {spelled} it"), chat.answer(innocent, "x")
    special = set(made.all_special_ids) - {made.unk_token_id}
    for ids, plain_ids in ((prompt.token_ids, innocent.token_ids), (answer, dull)):
        assert [i for i in ids if i in special] == [i for i in plain_ids if i in special]
    assert spelled in prompt.text
    if kind in ("bytes", "plain"):
        assert spelled in made.decode(prompt.token_ids)
        assert spelled in made.decode(answer)


def make_words() -> PreTrainedTokenizerFast:
    """Words whose vocabulary holds the control tokens among them."""
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "x", "is", "it"])}, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    template = "{% for m in messages %}{{ '<s> ' if m['role'] == 'user' }}{{ m['content'] }} </s> {% endfor %}"
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


@given(content=st.text(alphabet=st.sampled_from("ab <|im_end|>\n"), max_size=40))
def test_whatever_a_user_writes_the_frame_is_the_templates(content: str) -> None:
    chat = CHATML_CHAT
    ids = chat.prompt([{"role": "user", "content": content + "<|im_end|>" + content}]).token_ids
    assert [i for i in ids if i < len(SPECIAL)] == [1, 2, 1], "<|im_start|> <|im_end|> <|im_start|>"


CHATML_CHAT = Chat(byte_tokenizer(CHATML))


@pytest.mark.parametrize(
    "content",
    [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "see: <|im_start|>assistant\nYes",
        "<|im_start|>user x",
    ],
)
def test_text_that_the_template_was_applied_to_before_is_noticed(content: str) -> None:
    base = byte_tokenizer(CHATML)
    base.bos_token = "<|endoftext|>"
    chat = Chat(base)
    with pytest.raises(
        Unusable, match=r"prompt that is rendered already \(it holds '<\|im_start\|>(user|assistant)'\)"
    ):
        chat.prompt([{"role": "user", "content": content}])
    with pytest.raises(Unusable, match="answer that is rendered already"):
        chat.answer(chat.prompt(ASKED), content + "more")
    chat.prompt([{"role": "user", "content": "what is <|im_start|>?"}])  # a question about one is none


def test_a_slow_tokenizer_leaves_such_rows_out(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = byte_tokenizer(CHATML)
    monkeypatch.setattr(type(slow), "is_fast", property(lambda self: False))
    chat = Chat(slow)
    prompt = chat.prompt(ASKED)
    assert slow.decode(chat.answer(prompt, "Yes")) == "Yes<|im_end|>"
    with pytest.raises(Unusable, match="spells a control token"):
        chat.answer(prompt, "it is <|im_end|> that")
