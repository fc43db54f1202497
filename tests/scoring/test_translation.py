"""What another tokenizer reads of a response: the text as it grows, and boundaries that never hold what is to come."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from r3hf_ray.errors import ModelError
from r3hf_ray.scoring.translation import Translation, Translator, prompt_key, spell

WORDS = ["the ", " cat", "5 €", "é", "e\u0301", "ﬁ", "नि", "日本語", "猫"]
SIGNS = ["😀", "👨‍👩‍👧", "🇫🇷", "👍🏽", "  ", "\n", "\u200b", "\ufffd"]
TEXT = st.lists(
    st.one_of(st.sampled_from(WORDS + SIGNS), st.characters(codec="utf-8", exclude_characters="<▁")), max_size=16
).map("".join)
PAIRS = [
    ("short", "long"),
    ("long", "short"),
    ("long", "backwards"),
    ("backwards", "long"),
    ("long", "bytes"),
    ("bytes", "long"),
    ("fallback", "long"),
    ("long", "fallback"),
]
READS_BYTES = {"bytes", "short", "long", "backwards"}


def decoder(tokenizer: PreTrainedTokenizerBase):
    return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)


def byte_counts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> np.ndarray:
    """Bytes of UTF-8 that the tokens up to each one spell: a letter of a byte-level token is one byte."""

    def size(token: str) -> int:
        if token.startswith("<0x"):
            return 1
        return len(token.replace("▁", " ").encode()) if "fallback" in tokenizer.name_or_path else len(token)

    return np.cumsum([size(token) for token in tokenizer.convert_ids_to_tokens(ids)], dtype=np.int64)


def translator(policy, reader, **change) -> Translator:
    values = {"prompts": {}, "policy_before": "", "before": "", "end_ids": (2,), "max_tokens": 100}
    return Translator(Translation(**(values | change)), policy, reader)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module", autouse=True)
def names(tokenizers):
    for name, tokenizer in tokenizers.items():
        tokenizer.name_or_path = name


# ---------------------------------------------------------------------------------------------------- spelling


@given(text=TEXT, name=st.sampled_from(sorted(READS_BYTES | {"fallback"})))
def test_sound_text_is_spelled_as_it_is_with_every_whole_character_certain(tokenizers, text, name):
    ids = encode(tokenizers[name], text)
    spelled, ends = spell(decoder(tokenizers[name]), ids)
    assert spelled == text
    letters = np.cumsum([len(letter.encode()) for letter in text])
    whole = np.searchsorted(letters, byte_counts(tokenizers[name], ids), side="right")
    assert ends == [len(text[:count].rstrip("\ufffd")) for count in whole]


@given(data=st.data(), name=st.sampled_from(["bytes", "long", "backwards"]))
def test_bytes_that_are_no_text_are_spelled_as_the_decoder_does(tokenizers, data, name):
    tokenizer = tokenizers[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    spelled, ends = spell(decoder(tokenizer), ids)
    assert spelled == tokenizer.decode(ids, skip_special_tokens=True)
    assert ends == sorted(ends)


@given(data=st.data(), name=st.sampled_from(["bytes", "backwards", "fallback", "words"]))
def test_what_is_certain_no_later_token_changes(tokenizers, data, name):
    tokenizer = tokenizers[name]
    tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    ids, more = data.draw(tokens), data.draw(tokens)
    text, ends = spell(decoder(tokenizer), ids)
    longer, longer_ends = spell(decoder(tokenizer), ids + more)
    assert longer_ends[: len(ids)] == ends
    assert not ids or longer.startswith(text[: ends[-1]])


def test_a_byte_that_spoils_a_character_does_not_unsay_it(tokenizers):
    """The decoder of byte fallback takes a run of bytes as text or not as a whole."""
    tokenizer = tokenizers["fallback"]
    ids = tokenizer.convert_tokens_to_ids([*(f"<0x{byte:02X}>" for byte in [*"日".encode(), 0xFF]), "c"])
    assert tokenizer.decode(ids) == "\ufffd" * 4 + "c"
    assert spell(decoder(tokenizer), ids) == ("日\ufffdc", [0, 0, 1, 1, 3])


def test_special_tokens_are_no_text(tokenizers):
    tokenizer = tokenizers["long"]
    ids = [*encode(tokenizer, "the"), 1, *encode(tokenizer, " cat"), 2]
    text, ends = spell(decoder(tokenizer), ids)
    assert (text, ends) == ("the cat", [3, 3, 7, 7])


# ---------------------------------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@given(text=TEXT, finished=st.booleans())
def test_nothing_is_read_that_was_not_yet_sampled(tokenizers, pair, text, finished):
    """Counted in bytes, which both tokenizers spell one by one, not in the characters of the offsets."""
    policy, reader = (tokenizers[name] for name in pair)
    ids = encode(policy, text)
    if not ids:
        return
    retold = translator(policy, reader).response([*ids, 2] if finished else ids, finished=finished)
    assert retold.token_ids.tolist() == encode(reader, text)
    assert (np.diff(retold.boundary) >= 0).all()
    assert retold.boundary[-1] == len(retold.token_ids) - 1, "in the end all is read"
    sampled, read = byte_counts(policy, ids), byte_counts(reader, retold.token_ids.tolist())
    within = retold.boundary[: len(ids)]
    assert all(last < 0 or read[last] <= size for last, size in zip(within, sampled, strict=True))
    assert retold.loss == np.mean(np.diff(within, prepend=-1) == 0)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@given(text=TEXT)
def test_no_boundary_between_characters_is_missed(tokenizers, pair, text):
    policy, reader = (tokenizers[name] for name in pair)
    ids = encode(policy, text)
    if not ids or "\ufffd" in text:
        return
    retold = translator(policy, reader).response(ids, finished=False)
    sampled, read = byte_counts(policy, ids), byte_counts(reader, retold.token_ids.tolist())
    characters = {0, *np.cumsum([len(letter.encode()) for letter in text]).tolist()}
    for last, size in zip(retold.boundary, sampled, strict=True):
        shared = [index for index, count in enumerate(read.tolist()) if count <= size and count in characters]
        assert last >= max(shared, default=-1)


def test_by_hand(tokenizers):
    """A euro sign of three bytes and an emoji of four, in single bytes for the policy."""
    policy, reader = tokenizers["bytes"], tokenizers["long"]
    retold = translator(policy, reader).response(encode(policy, "a €😀"), finished=False)
    assert [reader.decode([token]) for token in retold.token_ids] == ["a", " €", "😀"]
    assert retold.boundary.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert retold.loss == 6 / 9


def test_the_same_vocabulary_keeps_the_sampled_ids(tokenizers):
    """Two tokens for what the tokenizer itself would write as one, and half a character: nothing is cut anew."""
    tokenizer = tokenizers["long"]
    ids = [*encode(tokenizer, "t"), *encode(tokenizer, "he"), encode(tokenizers["bytes"], "€")[0], 2]
    retold = translator(tokenizer, tokenizer).response(ids, finished=True)
    assert retold.token_ids.tolist() == ids[:-1]
    assert (retold.boundary.tolist(), retold.loss) == ([0, 1, 2, 2], 0.0)
    assert translator(tokenizer, tokenizer).response([2], finished=True).boundary.tolist() == [-1]


def test_each_format_has_its_own_start(tokenizers):
    policy, reader = tokenizers["long"], tokenizers["bytes"]
    ids = encode(policy, " the cat")
    retold = translator(policy, reader, policy_before=" ", before="\n> ").response([*ids, 2], finished=True)
    assert reader.decode(retold.token_ids) == "\n> the cat"
    assert retold.boundary.tolist() == [5, 9, 9]
    bare = translator(policy, reader, policy_before=" ").response(encode(policy, "cat"), finished=False)
    assert reader.decode(bare.token_ids) == "cat", "a start that was not sampled is not taken away"


@pytest.mark.parametrize("name", ["long", "bytes", "fallback", "words", "pieces"])
def test_control_tokens_that_the_policy_wrote_are_letters(tokenizers, name):
    """In its own tokens they are plain text; what the reward model's format puts before an answer is its own to say."""
    policy, reader = tokenizers["bytes"], pieces() if name == "pieces" else tokenizers[name]
    written = [token for part in ("the", "<", "eos", ">", " the") for token in encode(policy, part)]
    assert 2 in encode(reader, policy.decode(written)), "its tokenizer would read the end of the answer"
    retold = translator(policy, reader, before="<bos> ").response([*written, 2], finished=True)
    (bos,) = encode(reader, "<bos>")
    assert retold.token_ids[0] == bos and 2 not in retold.token_ids
    assert not {bos, 2} & set(retold.token_ids[1:].tolist())
    if name == "long":
        tokens = reader.convert_ids_to_tokens(retold.token_ids.tolist())
        assert tokens == ["<bos>", "Ġthe", "<", "e", "o", "s", ">", *reader.tokenize(" the")]
        assert retold.boundary[0] == 0, "its own control token says nothing of the answer"
    assert 2 in encode(reader, "<eos>"), "the tokenizer itself is left as it was"


def pieces() -> PreTrainedTokenizerFast:
    """Unigram as in SentencePiece: control tokens are pieces of the vocabulary, and likelier than any other."""
    letters = {letter: -3.0 for letter in "▁the<os>"}
    scores = {"<unk>": 0.0, "<bos>": 0.0, "<eos>": 0.0, **letters}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def test_spaces_stay_where_they_were_sampled(tokenizers):
    """The tokenizer's own post-processor would trim a token's spaces off its offsets, and so read ahead."""
    policy, reader = tokenizers["bytes"], tokenizers["backwards"]
    retold = translator(policy, reader).response(encode(policy, "the  cat"), finished=False)
    tokens = reader.convert_ids_to_tokens(retold.token_ids.tolist())
    read = np.cumsum([len(token) for token in tokens])
    assert all(last < 0 or read[last] <= size for size, last in enumerate(retold.boundary.tolist(), start=1))


def test_text_that_does_not_survive_is_loss(tokenizers):
    """Lower case and accents are read, if otherwise; characters it has no word for are unknown, spaces are dropped."""
    policy, reader = tokenizers["bytes"], tokenizers["words"]
    assert translator(policy, tokenizers["long"]).response(encode(policy, "the"), finished=False).loss == 2 / 3
    known = translator(policy, reader).response(encode(policy, "THE cat"), finished=False)
    assert reader.convert_ids_to_tokens(known.token_ids.tolist()) == ["the", "cat"]
    assert known.boundary.tolist() == [-1, -1, 0, 0, 0, 0, 1]
    unknown = translator(policy, reader).response(encode(policy, "5 猫"), finished=False)
    assert set(reader.convert_ids_to_tokens(unknown.token_ids.tolist())) == {"<unk>"}
    assert unknown.loss == 1.0
    assert unknown.boundary[-1] == len(unknown.token_ids) - 1, "its scores are taken all the same"


@pytest.mark.parametrize(("ids", "finished"), [([2], True), ([1], False), ([0, 1], False)])
def test_a_response_without_text(tokenizers, ids, finished):
    retold = translator(tokenizers["long"], tokenizers["bytes"]).response(ids, finished=finished)
    assert len(retold.token_ids) == 0
    assert retold.boundary.tolist() == [-1] * len(ids)
    assert retold.loss == (0.0 if finished else 1.0)


# ---------------------------------------------------------------------------------------------------- refusals


def test_a_prompt_of_another_run_is_refused(tokenizers):
    ids = np.array([5, 6])
    ours = translator(tokenizers["long"], tokenizers["bytes"], prompts={prompt_key(ids): np.array([9], np.int32)})
    assert ours.prompt(ids.astype(np.int64)).tolist() == [9]
    with pytest.raises(ModelError, match="not among the run's"):
        ours.prompt(np.array([5]))


def test_a_tokenizer_without_offsets_is_refused(tokenizers, monkeypatch):
    slow = type(tokenizers["long"])(tokenizer_object=tokenizers["long"].backend_tokenizer)
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(ModelError, match="gives no character offsets"):
        translator(tokenizers["long"], slow)


def test_a_retold_answer_begins_as_it_does_behind_its_prompt(
    tokenizer: PreTrainedTokenizerFast, metaspace: Callable[[str | None], PreTrainedTokenizerFast]
) -> None:
    """A tokenizer that marks the first word of a text does not mark an answer's, which is not the whole's first."""
    pieces = metaspace(None)
    for before, first in (("", "Y"), (" ", "▁Y"), ("<s>", "Y")):
        retold = translator(tokenizer, pieces, before=before).response(encode(tokenizer, "Yes, é"), finished=False)
        ids = encode(pieces, before) if before == "<s>" else []
        assert pieces.convert_ids_to_tokens(retold.token_ids.tolist()[len(ids) :])[:3] == [first, "e", "s"]
        assert retold.boundary[2] == len(ids) + 2
