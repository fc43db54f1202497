"""Reward models run by vLLM: a pooling engine that scores every token, held against transformers before it is used.

Chosen by ``reward.backend = "vllm"``. vLLM runs its own kernels, casts, poolers and activations, and which of them it
takes for a folder depends on its version; so nothing is believed, and each reader starts with a proof.
"""

import gc
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import AutoConfig

from r3hf_ray.algorithms.redistribution import PrefixScores
from r3hf_ray.errors import ModelError
from r3hf_ray.models.folder import window
from r3hf_ray.models.running_sum import RunningSumConfig
from r3hf_ray.scoring.prefix_scores import at_prefixes
from r3hf_ray.scoring.readers import ReaderSettings, Reading, SameIds, Sampled

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.5}
"""Largest difference from transformers on the probe, in standard deviations of the probe's scores. Measured on a 135M
model: 5e-5 and 0.16. In bfloat16 either backend is up to 0.7 from float32, so there the bound finds a score that is
wrong and not one that is rounded otherwise."""

PROBE_LENGTHS = (2, 17, 130, 300)
"""Of the probe's rows: shorter and longer than one and two blocks of the CPU's cache (128). [tokens]"""

CACHE_BYTES = 2**30
"""Keys and values of an engine, at least. Rows wait for each other where it is full, so it limits one row's length
only."""

SPARE_TOKENS = 256
"""Cached beyond the longest row: its last block, and one that vLLM keeps for itself; 128 each on a CPU. [tokens]"""

USE_TRANSFORMERS = "use reward.backend = transformers"


class VllmReader:
    """Reads ids as they are, like `readers.SameIds`, in a vLLM engine of this process: unpadded, with no prefix cache.

    The process needs `environment.VLLM` (on a CPU `VLLM_ON_CPU`) before vLLM is first imported.
    """

    def __init__(self, settings: ReaderSettings) -> None:
        """Score a probe with transformers, free that model, start the engine, and compare.

        Raises:
            ModelError: transformers cannot load the model, vLLM cannot run it or has no room for the longest row, or
                the largest difference of their scores is above `BOUNDS`.
        """
        require_readable(settings.source, attention=settings.maps)
        self._settings = settings
        batch = probe(settings)
        expected = SameIds(settings).read(batch).scores
        gc.collect()  # transformers' modules hold cycles, and a GPU may not have room for both models
        try:
            self._engine = _engine(settings)
            found = self.read(batch)
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"{settings.source}: vLLM cannot run it ({reason}); {USE_TRANSFORMERS}") from error
        require_room(self._limit, settings)
        require_equal(found, expected, batch.response_mask, settings)

    @property
    def _limit(self) -> int:
        """Longest row that the engine reads. [tokens]"""
        return int(self._engine.model_config.max_model_len)

    def read(self, batch: Sampled) -> Reading:
        """Scores of every prefix; a row longer than the engine's cache, of a translation only, is refused."""
        from vllm import PoolingParams

        suffix = torch.tensor(self._settings.suffix_ids, dtype=torch.long)
        texts = zip(batch.token_ids.cpu(), batch.attention_mask.cpu(), batch.finished.tolist(), strict=True)
        rows = [torch.cat([ids[inside], suffix]) if ended else ids[inside] for ids, inside, ended in texts]
        limit = self._limit
        readable = [number for number, row in enumerate(rows) if len(row) <= limit]
        asked = [{"prompt_token_ids": rows[number].tolist()} for number in readable]
        raw = PoolingParams(use_activation=False)
        outputs = self._engine.encode(asked, raw, pooling_task="token_classify", use_tqdm=False) if asked else []
        scores = torch.zeros(len(rows), batch.token_ids.shape[1] + len(suffix))
        for number, output in zip(readable, outputs, strict=True):
            scores[number, : len(rows[number])] = output.outputs.data[:, 0]
        device = batch.token_ids.device
        ends = torch.tensor([len(row) for row in rows], device=device)
        return Reading(
            scores=at_prefixes(scores.to(device), batch.attention_mask, batch.response_mask, ends),
            alignment_loss=torch.zeros(len(rows), device=device),
            refused={
                number: f"it has {len(row)} tokens, and vLLM reads no row of more than {limit}; {USE_TRANSFORMERS}"
                for number, row in enumerate(rows)
                if len(row) > limit
            },
        )


def require_readable(source: str, *, attention: bool) -> None:
    """Refuse what vLLM cannot do, before anything is loaded.

    Args:
        source: folder or hub name of a reward model.
        attention: whether the run's method reads attention.

    Raises:
        ModelError: attention is read, or the model sums its head over all tokens.
    """
    if attention:
        raise ModelError(f"reward.backend = vllm gives no attention, which reward.mode pays by; {USE_TRANSFORMERS}")
    if isinstance(AutoConfig.from_pretrained(source), RunningSumConfig):
        raise ModelError(f"{source}: vLLM has no running-sum head; {USE_TRANSFORMERS}")


def probe(settings: ReaderSettings) -> Sampled:
    """Rows of random ids, every other one finished, the same for every model with this vocabulary and window."""
    config = AutoConfig.from_pretrained(settings.source).get_text_config()
    longest = window(config) - len(settings.suffix_ids)
    lengths = [min(length, longest) for length in PROBE_LENGTHS]
    generator = np.random.default_rng(0)
    return Sampled.of(
        [generator.integers(config.vocab_size, size=length).astype(np.int32) for length in lengths],
        [1 + length // 4 for length in lengths],
        [number % 2 == 0 for number in range(len(lengths))],
        device=torch.device(settings.device),
    )


def require_room(limit: int, settings: ReaderSettings) -> None:
    """Refuse an engine that would refuse long rows, and so leave the policy's long responses out of training.

    Args:
        limit: longest row that the engine reads. [tokens]
        settings: of the reader, with the longest row that can come.

    Raises:
        ModelError: a longer one can come.
    """
    if settings.longest is not None and settings.longest > limit:
        raise ModelError(
            f"{settings.source}: with reward.backend = vllm it reads rows of up to {limit} tokens, and one of "
            f"{settings.longest} can come: lower rollout.max_response_tokens or data.max_prompt_tokens, or "
            f"{USE_TRANSFORMERS}"
        )


def cache_bytes(settings: ReaderSettings) -> int:
    """Room for the keys and values of the longest row, as of a decoder that keeps them all, and never little."""
    config = AutoConfig.from_pretrained(settings.source).get_text_config()
    sizes = config.to_dict()
    heads = sizes.get("num_key_value_heads") or config.num_attention_heads
    width = sizes.get("head_dim") or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * settings.dtype.itemsize
    return max(CACHE_BYTES, token * ((settings.longest or 0) + SPARE_TOKENS))


def require_equal(
    found: Reading, expected: PrefixScores, response_mask: Bool[Tensor, "B T"], settings: ReaderSettings
) -> None:
    """Refuse a reader whose scores of the probe are not those of transformers.

    Args:
        found: what vLLM says of the probe.
        expected: what transformers says of it.
        response_mask: of the probe.
        settings: of the reader; its dtype decides the bound.

    Raises:
        ModelError: a row was refused, a score is not finite, or the largest difference is above `BOUNDS`.
    """
    if found.refused:
        raise ModelError(f"{settings.source}: of a probe's row vLLM says that {next(iter(found.refused.values()))}")
    ours, theirs = (
        torch.cat([scores.prefix[response_mask], scores.prompt, scores.pooled]) for scores in (found.scores, expected)
    )
    gap, spread, bound = float((ours - theirs).abs().max()), float(theirs.std()), BOUNDS[settings.dtype]
    if not gap <= bound * spread:  # so that nan is refused too
        dtype = str(settings.dtype).removeprefix("torch.")
        raise ModelError(
            f"{settings.source}: vLLM and transformers differ by up to {gap:.2g} in the scores of a probe, whose "
            f"standard deviation is {spread:.2g}; {bound:g} of that is accepted in {dtype}: {USE_TRANSFORMERS}"
        )


def _engine(settings: ReaderSettings) -> Any:
    """Prefill only, so graphs and the prefix cache have nothing to give; the longest row is what the cache holds."""
    from vllm import LLM
    from vllm.config import PoolerConfig

    return LLM(
        model=settings.source,
        runner="pooling",
        convert="classify",
        pooler_config=PoolerConfig(task="token_classify", use_activation=False),
        dtype=settings.dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=True,
        max_model_len=-1,
        kv_cache_memory_bytes=cache_bytes(settings),
        gpu_memory_utilization=0.1,  # only compared with what is free, next to an explicit cache
        disable_log_stats=True,
    )
