"""Preference pairs for an audit, from anything `r3hf reward` can train on."""

from transformers import PreTrainedTokenizerBase

from r3hf_ray.data.loading import load_pairs
from r3hf_ray.sections.data import DataSection
from r3hf_ray.types import Pair


def audit_pairs(data: DataSection, tokenizer: PreTrainedTokenizerBase, *, window: int) -> tuple[list[Pair], str]:
    """Pairs that fit the reward model's window, and one line that says what was read and left out.

    Raises:
        DataError: unreadable data, rows without preferences, or no usable row.
    """
    loaded = load_pairs(data.model_copy(update={"max_prompt_tokens": window}), tokenizer, max_tokens=window)
    return loaded.train, str(loaded.report)


def selection(data: DataSection) -> str:
    """A data source in words, with what was set to find and read its rows.

    Example: ``PKU-Alignment/PKU-SafeRLHF (split test, format safe_rlhf_cost)``
    """
    given = data.model_dump(exclude_defaults=True, include={"config", "data_dir", "split", "format"})
    words = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"{data.source} ({words})" if words else data.source
