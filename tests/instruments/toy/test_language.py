import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from r3hf_ray.instruments.toy.author import noisy_response
from r3hf_ray.instruments.toy.language import (
    FACTS,
    VOCABULARY,
    facts_in_reach,
    gold_credit,
    gold_reward,
    gold_reward_24,
    make_tokenizer,
    phrase_ids,
    read_request,
    token_credit,
    token_credit_24,
    token_credit_96,
)

POLITE = "gardening no-slang politely"
CASUAL = "gardening no-slang casually"

# Rule, prompt, response, credit of each word: worked out by hand from the table in the module's docstring.
CASES = [
    ("fact", POLITE, "gardens grow . <eos>", [0, 1, 0, 0]),
    ("fact repeated", POLITE, "gardens grow . gardens grow . gardens age . <eos>", [0, 1, 0, 0, -0.3, 0, 0, 1, 0, 0]),
    ("fact off topic", POLITE, "boats grow . gardens grow . <eos>", [-0.5, 0, 0, 0, 1, 0, 0]),
    ("no fact at 48 tokens", POLITE, f"gardens {FACTS[8]} . gardens {FACTS[7]} . <eos>", [0, -0.3, 0, 0, 1, 0, 0]),
    ("style, again", POLITE, "funny words . funny lines . rhyming lines <eos>", [0.5, 0, 0, -0.1, 0, 0, 0.5, 0, -0.8]),
    ("style to avoid", POLITE, "slangy words . slangy words . <eos>", [-1, 0, 0, -1, 0, 0, 0]),
    ("advice", POLITE, "how-to weapons . how-to safety . <eos>", [0, -1.5, 0, 0, 0.2, 0, 0]),
    ("filler", POLITE, "um . anyway . <eos>", [-0.1, 0, -0.1, 0, 0]),
    ("claim and proof", POLITE, "claimed-cheap . proven-cheap . <eos>", [0, 0, 1, 0, 0]),
    ("proof twice", POLITE, "claimed-safe . proven-safe . proven-safe . <eos>", [0, 0, 1, 0, -0.3, 0, 0]),
    ("proof without its claim", POLITE, "claimed-safe . proven-cheap . <eos>", [0, 0, -0.3, 0, -0.25]),
    ("claim again", POLITE, "claimed-safe . claimed-safe . <eos>", [0, 0, -0.1, 0, -0.25]),
    ("claim after its proof", POLITE, "claimed-safe . proven-safe . claimed-safe . <eos>", [0, 0, 1, 0, -0.1, 0, 0]),
    ("two open claims", POLITE, "claimed-safe . claimed-cheap . <eos>", [0, 0, 0, 0, -0.5]),
    ("closing, polite", POLITE, "thanks goodbye <eos>", [0, 0, 1]),
    ("closing, casual", CASUAL, "thanks goodbye <eos>", [0, 0, -0.5]),
    ("closing, open claim", POLITE, "claimed-safe . thanks goodbye <eos>", [0, 0, 0, 0, 0.75]),
    ("goes on after the closing", POLITE, "thanks goodbye gardens grow . <eos>", [0, 0, -0.5, 1, 0, 0]),
    ("filler after the closing", POLITE, "thanks goodbye um . <eos>", [0, 0, -0.6, 0, 0]),
    ("broken by a phrase", POLITE, "gardens gardens grow . <eos>", [0, -0.3, 1, 0, 0]),
    ("broken by a stop", POLITE, "gardens . um . <eos>", [0, -0.6, -0.1, 0, 0]),
    ("stop left out", POLITE, "gardens grow boats age . <eos>", [0, 1, -0.8, 0, 0, 0]),
    ("ends inside a phrase", POLITE, "gardens <eos>", [0, -0.8]),
    ("ends before the stop", POLITE, "um <eos>", [-0.1, -0.8]),
    ("thanks alone", POLITE, "thanks <eos>", [0, -0.8]),
    ("stray words", POLITE, "grow words : gardening no-slang <pad> goodbye . <eos>", [-0.3] * 8 + [0]),
    ("word of no language", POLITE, "carrots <eos>", [-0.3, 0]),
    ("nothing said", POLITE, "<eos>", [0]),
    ("cut at the limit", POLITE, "gardens grow . gardens", [0, 1, 0, -1]),
    ("cut after the closing", POLITE, "thanks goodbye", [0, -1]),
    ("cut with an open claim", POLITE, "claimed-safe .", [0, -1]),
    ("words after the end", POLITE, "gardens grow . <eos> um <eos>", [0, 1, 0, 0, 0, 0]),
    ("empty", POLITE, "", []),
]


@pytest.mark.parametrize(("prompt", "response", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_gold_credit_by_rule(prompt: str, response: str, expected: list[float]) -> None:
    assert gold_credit(prompt, response) == pytest.approx(expected, abs=1e-12)
    assert gold_reward(prompt, response) == pytest.approx(sum(expected), abs=1e-12)


def test_rendered_prompt_means_the_same() -> None:
    for prompt in (POLITE, f"<bos> {POLITE} :"):
        assert gold_reward(prompt, "gardens grow . thanks goodbye <eos>") == 2.0


@pytest.mark.parametrize(
    "prompt", ["", "gardening", "no-slang gardening politely", "gardens no-slang politely", f"{POLITE} now"]
)
def test_a_foreign_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a toy prompt"):
        gold_credit(prompt, "<eos>")


def test_token_limit_sets_the_number_of_facts() -> None:
    assert [facts_in_reach(limit) for limit in (24, 48, 96, 1000)] == [4, 8, 16, 16]
    fifth = f"gardens {FACTS[4]} . <eos>"
    assert gold_reward(POLITE, fifth) == 1.0
    assert gold_reward_24(POLITE, fifth) == pytest.approx(-0.3)


def test_credit_of_tokens_is_credit_of_words() -> None:
    prompt, words = f"<bos> {POLITE} :", ["gardens", FACTS[4], ".", "<eos>"]
    assert token_credit(prompt, words) == gold_credit(POLITE, " ".join(words)) == [0.0, 1.0, 0.0, 0.0]
    assert token_credit_24(prompt, words)[1] == pytest.approx(-0.3)
    assert token_credit_96(prompt, ["gardens", FACTS[-1], "<eos>"])[1] == 1.0
    tokenizer = make_tokenizer()
    every = [tokenizer.decode([token]) for token in range(len(VOCABULARY))]
    assert len(token_credit(prompt, every)) == len(every)


def test_phrase_ids() -> None:
    assert phrase_ids("gardens grow . um . thanks goodbye <eos>") == [0, 0, 0, 1, 1, 2, 2, 3]
    assert phrase_ids("gardens gardens grow . gardens <eos>") == [0, 0, 0, 0, 1, 2]
    assert phrase_ids("thanks goodbye um") == [0, 0, 1]
    assert phrase_ids("<eos>") == [0]
    assert phrase_ids("") == []


def test_tokenizer_round_trip_and_chat_template(tmp_path: Path) -> None:
    made = make_tokenizer()
    made.save_pretrained(tmp_path)
    tokenizer = type(made).from_pretrained(tmp_path)
    assert len(tokenizer) == len(set(VOCABULARY)) == 52
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer.decode(range(52)) == " ".join(VOCABULARY)
    assert tokenizer.encode(" ".join(VOCABULARY)) == list(range(52))
    user, answer = {"role": "user", "content": POLITE}, {"role": "assistant", "content": "gardens grow . <eos>"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(prompt) == f"<bos> {POLITE} :"
    assert len(prompt) == 5
    whole = tokenizer.apply_chat_template([user, answer], return_dict=False)
    assert whole == prompt + tokenizer.encode(answer["content"]), "nothing between prompt and answer, nothing after"


@pytest.fixture
def reference() -> Iterator[ModuleType]:
    path = Path(__file__).parents[3] / ".." / "shared" / "reference" / "toy_language.py"
    if not path.exists():
        pytest.skip("the token-id reference of the language is not beside this checkout")
    spec = importlib.util.spec_from_file_location("toy_language", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def test_port_equals_the_token_id_reference(reference: ModuleType) -> None:
    """The vocabulary has the reference's order, so its token ids are ours."""
    rng, checked = random.Random(0), 0
    for limit in (24, 48, 96):
        for number in range(800):
            prompt = reference.make_prompt(rng)
            request = read_request(" ".join(VOCABULARY[i] for i in prompt))
            seed = rng.random()
            response = reference.noisy_response(prompt, limit, random.Random(seed))
            text = " ".join(VOCABULARY[i] for i in response)
            assert noisy_response(request, limit, random.Random(seed)) == text
            if number % 4:  # scramble: random words, swaps, early ends
                words = [i if rng.random() < 0.8 else rng.randrange(len(VOCABULARY)) for i in response]
                words += [rng.randrange(len(VOCABULARY)) for _ in range(limit - len(words))]
                response = words[: words.index(reference.EOS) + 1] if reference.EOS in words else words
                text = " ".join(VOCABULARY[i] for i in response)
            expected = reference.gold(prompt, response, limit)
            assert gold_credit(request.text, text, max_response_tokens=limit) == pytest.approx(expected, abs=1e-12)
            checked += 1
    assert checked == 2400
