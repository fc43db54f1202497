"""Where examples come from."""

from typing import Literal

from r3hf_ray.sections.fields import NonNegative, Positive, Section

RowFormat = Literal[
    "auto",
    "messages",
    "preference",
    "hh",
    "prompt",
    "ranked",
    "safe_rlhf",
    "safe_rlhf_cost",
    "tldr_pairs",
    "nectar",
]
"""Shapes of a row that are read."""


class DataSection(Section):
    """Where prompts, dialogues or preferences come from."""

    source: str
    """A hub name (`Anthropic/hh-rlhf`) or a local .jsonl, .jsonl.gz, .json, .parquet or .csv file."""
    config: str | None = None
    """Configuration name of a hub dataset."""
    data_dir: str | None = None
    """Folder inside a hub dataset, as HH-RLHF has them (`harmless-base`)."""
    split: str = "train"
    """Split of a hub dataset."""
    format: RowFormat = "auto"
    """Shape of a row: `messages` (chat), `preference` (prompt/chosen/rejected), `hh` (chosen/rejected dialogues),
    `prompt` (text), `ranked` (prompt, responses, scores), or a published dataset's own; `safe_rlhf_cost` prefers the
    less safe answer, for a cost model."""
    max_prompt_tokens: Positive = 512
    """Longest rendered prompt; a longer one is counted, listed with its line number, and left out. [tokens]"""
    limit: Positive | None = None
    """Use only the first `limit` usable rows after `skip`. [rows]"""
    skip: NonNegative = 0
    """Leave out the first `skip` usable rows. [rows]"""
    heldout: NonNegative = 0
    """Rows at the end of the selection kept for evaluation, never trained on. [rows]"""
