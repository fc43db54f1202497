"""Reading sampled responses with a reward model: what it says of every prefix, in the policy's token index.

A reader's answer has the policy's shape whatever the reward model's tokens are, so that everything behind it (the
redistribution, the learner, the samples' page) never hears of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from r3hf_ray.algorithms.alignment import align
from r3hf_ray.algorithms.batching import pad_sequences
from r3hf_ray.algorithms.redistribution import PrefixScores
from r3hf_ray.models.attention import Attention
from r3hf_ray.models.load import load_reward_model, require_causal
from r3hf_ray.scoring.prefix_scores import prefix_scores
from r3hf_ray.scoring.translation import Translator


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A microbatch of prompts and responses in one tokenizer's ids, right-padded: ``[B, T]`` and ``[B]``.

    Example, prompt ``[5, 6]`` and response ``[7, 2]`` (2 is EOS): ``token_ids=[[5, 6, 7, 2]],
    attention_mask=[[1, 1, 1, 1]], response_mask=[[0, 0, 1, 1]], finished=[1]``.
    """

    token_ids: Int64[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    """True on prompt and response."""
    response_mask: Bool[Tensor, "B T"]
    finished: Bool[Tensor, "B"]
    """Ended with EOS, not at the length limit; only such rows get what a reader reads behind a response."""

    @classmethod
    def of(
        cls, rows: Sequence[np.ndarray], prompt_lens: Sequence[int], finished: Sequence[bool], *, device: torch.device
    ) -> "Sampled":
        """Pad rows of prompt + response with id 0."""
        ids, attended, responds = (array.to(device) for array in pad_sequences(rows, prompt_lens, pad_id=0))
        return cls(
            token_ids=ids,
            attention_mask=attended,
            response_mask=responds,
            finished=torch.tensor(finished, device=device),
        )

    @property
    def arrays(self) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Token ids, attention mask and response mask, as a model's functions take them."""
        return self.token_ids, self.attention_mask, self.response_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reward model says of a microbatch, in the policy's token index."""

    scores: PrefixScores
    attention: Float[Tensor, "B T"] | None = None
    """What the last token pays to each; measured for `abc` only."""
    alignment_loss: Float[Tensor, "B"]
    """Share of the response's tokens, EOS apart, at which the reward model has no score of its own."""
    refused: dict[int, str] = field(default_factory=dict)
    """Rows that it cannot read, and why; their numbers mean nothing."""


@runtime_checkable
class Reader(Protocol):
    """A reward model that can be asked about a microbatch."""

    def read(self, batch: Sampled) -> Reading:
        """Its scores of every prefix; a row's response may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderSettings:
    """What a reader needs to load a reward model that reads ids of its own vocabulary."""

    source: str
    suffix_ids: tuple[int, ...]
    """Read behind the last token of a finished row, before pooling."""
    attention: Attention = "auto"
    """Which implementation, where no maps are asked for, which only the plain one returns."""
    maps: bool = False
    """Whether the attention of the last token is asked for too."""
    prefixes: bool = True
    """Whether the scores of prefixes matter, so that the model must be causal."""
    dtype: torch.dtype
    device: str
    longest: int | None = None
    """Longest row that can come, with what is read behind it; None: not known. [tokens]"""


MakeReader = Callable[[ReaderSettings], Reader]
"""Loads a reward model: `SameIds`, or one that runs it elsewhere."""


class SameIds:
    """Reads the ids as they are, through transformers, in one forward."""

    def __init__(self, settings: ReaderSettings, model: PreTrainedModel | None = None) -> None:
        """Load the model, or take the given one in its place.

        Raises:
            ModelError: it cannot be loaded, or prefixes are read and it looks ahead.
        """
        self.settings = settings
        model = model or load_reward_model(
            settings.source, settings.dtype, attention="eager" if settings.maps else settings.attention
        )
        self.model: PreTrainedModel = model.to(settings.device)
        if settings.prefixes:
            require_causal(self.model, self.model.get_input_embeddings().num_embeddings)

    def read(self, batch: Sampled) -> Reading:
        """Its scores of every prefix, and its attention where that is asked for."""
        scores, attention = prefix_scores(
            self.model,
            *batch.arrays,
            suffix_ids=list(self.settings.suffix_ids),
            finished=batch.finished,
            maps=self.settings.maps,
        )
        return Reading(scores=scores, attention=attention, alignment_loss=torch.zeros_like(scores.pooled))


class Aligned:
    """Reads the same dialogues in the reward model's own tokens, and takes its scores at the ends of the policy's.

    One forward of the reward model over rows that may be longer than the policy's. See `algorithms.alignment`.
    """

    def __init__(self, reader: Reader, translator: Translator) -> None:
        """``reader`` reads what ``translator`` gives; it reads the end of an answer behind each finished row."""
        self._reader, self._translator = reader, translator

    def read(self, batch: Sampled) -> Reading:
        """Its scores at the ends of the policy's tokens; no attention, which it pays to other tokens.

        Raises:
            ModelError: a prompt is not in the translator's table.
        """
        arrays = (array.cpu().numpy() for array in (*batch.arrays, batch.finished))
        rows = [self._row(*row) for row in zip(*arrays, strict=True)]
        device = batch.token_ids.device
        theirs = Sampled.of(
            [row.token_ids for row in rows],
            [row.prompt_len for row in rows],
            [row.finished for row in rows],
            device=device,
        )
        reading = self._reader.read(theirs)
        columns = torch.from_numpy(np.stack([row.columns for row in rows])).to(device)
        return Reading(
            scores=align(reading.scores, columns, batch.response_mask),
            alignment_loss=torch.tensor([row.loss for row in rows], device=device),
            refused=reading.refused | {number: row.refusal for number, row in enumerate(rows) if row.refusal},
        )

    def _row(self, token_ids: np.ndarray, inside: np.ndarray, responds: np.ndarray, finished: np.bool_) -> "_Row":
        prompt = self._translator.prompt(token_ids[inside & ~responds])
        retold = self._translator.response(token_ids[responds].tolist(), finished=bool(finished))
        columns = np.full(len(token_ids), -1, np.int64)
        columns[responds] = np.where(retold.boundary >= 0, len(prompt) + retold.boundary, -1)
        ids, limit = np.concatenate([prompt, retold.token_ids]), self._translator.translation.max_tokens
        row = _Row(ids, len(prompt), bool(finished), columns, retold.loss)
        if len(ids) <= limit:
            return row
        refusal = f"its text has {len(ids)} tokens in a reward model's tokenizer, which can read {limit}"
        return replace(row, token_ids=prompt, finished=False, columns=np.full_like(columns, -1), refusal=refusal)


@dataclass(frozen=True, slots=True)
class _Row:
    """One row as the reward model reads it, and the column of its scores for each of the policy's tokens."""

    token_ids: np.ndarray
    prompt_len: int
    finished: bool
    columns: np.ndarray
    loss: float
    refusal: str = ""
