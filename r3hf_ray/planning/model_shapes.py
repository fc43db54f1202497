"""How large a model and its activations are: built without memory, and one of its blocks run on tensors without data.

Nothing here is a formula of a family: parameters are counted on the meta device, and what one decoder block keeps for
its backward is what torch's own tracker sees of a block that runs on fake tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from r3hf_ray.errors import ModelError
from r3hf_ray.models.folder import first_line, read_config
from r3hf_ray.models.sharding import decoder_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """What one microbatch keeps, above weights. [bytes]

    Example, 8,192 tokens through Qwen2.5-1.5B in bfloat16: ``Activations(entry=25_165_824, kept=931_135_488,
    tail=76_000_000, backward=1_278_000_000, forward=550_000_000)``
    """

    entry: int
    """Hidden states that enter a block: all that checkpointing keeps of it."""
    kept: int
    """What a block keeps for its backward."""
    tail: int
    """What stands behind the blocks (the last norm)."""
    backward: int
    """The largest moment of one block's forward and backward, its own gradients and the tail included."""
    forward: int
    """The largest moment of one block's forward without gradients."""


class ModelShape:
    """The size of a model. Example: ``ModelShape("Qwen/Qwen2.5-1.5B-Instruct", "policy").parameters`` is 1543714304"""

    def __init__(self, source: str, kind: str, *, scores: bool = False) -> None:
        """Read its configuration and build it without memory.

        Args:
            source: folder, of which config.json is read alone, or hub name.
            kind: what it is for ("policy", "reward model"), used in sentences.
            scores: whether it is a reward model.

        Raises:
            ModelError: there is no configuration, or transformers knows no such model.
        """
        self.source, self.kind = source, kind
        self._config = read_config(source, kind)
        make = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        try:
            with torch.device("meta"):
                model = make.from_config(self._config)
        except Exception as error:  # whatever a library makes of a stranger's file
            raise ModelError(f"{source}: cannot be built as {kind}: {first_line(error)}") from error
        text = self._config.get_text_config()
        self.hidden, self.vocabulary = int(text.hidden_size), int(text.vocab_size)
        blocks = decoder_blocks(model)
        self.layers = len(blocks)
        self.parameters = count(model)
        self.trunk_parameters = count(model.base_model)
        self.block_parameters = max(map(count, blocks), default=0)
        self.root_parameters = self.trunk_parameters - sum(map(count, blocks))
        """Of the trunk, outside its blocks: embedding and last norm."""
        self.head_parameters = 0 if scores else count(model.get_output_embeddings())
        self.tied = self.parameters == self.trunk_parameters
        self._measured: dict[tuple[int, int, torch.dtype], Activations] = {}

    def _trunk(self, dtype: torch.dtype) -> PreTrainedModel:
        """The trunk cut to its first block, without data."""
        config = deepcopy(self._config)
        config.get_text_config().num_hidden_layers = 1  # only that few are built for nothing
        trunk = AutoModel.from_config(config, dtype=dtype).eval()
        first = decoder_blocks(trunk)[0]
        for part in trunk.modules():
            if isinstance(part, nn.ModuleList) and first in list(part):
                del part[1:]
        return trunk

    @cached_property
    def cached_per_token(self) -> int:
        """Keys and values of one token in all blocks. [numbers]"""
        with FakeTensorMode():
            hidden = torch.zeros(1, 1, self.hidden)
            cache = self._trunk(hidden.dtype)(inputs_embeds=hidden, use_cache=True).past_key_values
            return self.layers * sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers[:1])

    def activations(self, rows: int, length: int, dtype: torch.dtype) -> Activations:
        """Of a microbatch of ``rows`` sequences of ``length`` tokens."""
        key = (rows, length, dtype)
        if key not in self._measured:
            with FakeTensorMode():
                hidden = torch.zeros(rows, length, self.hidden, dtype=dtype)
                self._measured[key] = _measure(self._trunk(dtype), hidden)
        return self._measured[key]


def count(module: nn.Module) -> int:
    """Parameters, shared (tied) ones once."""
    return sum(p.numel() for p in module.parameters())


def _measure(trunk: PreTrainedModel, hidden: Tensor) -> Activations:
    with _tracked(trunk, hidden) as tracker, torch.no_grad():
        start = _bytes(tracker, "current")
        trunk(inputs_embeds=hidden, use_cache=False)
    forward = _bytes(tracker, "peak") - start
    around: list[int] = []
    block = decoder_blocks(trunk)[0]
    for register in (block.register_forward_pre_hook, block.register_forward_hook):
        register(lambda *_: around.append(_bytes(tracker, "current")))
    with _tracked(trunk, hidden.requires_grad_()) as tracker:
        out = trunk(inputs_embeds=hidden, use_cache=False).last_hidden_state
        behind = _bytes(tracker, "current")
        out.sum().backward()
    return Activations(
        entry=hidden.numel() * hidden.dtype.itemsize,
        kept=around[1] - around[0],
        tail=behind - around[1],
        backward=_bytes(tracker, "peak") - start,
        forward=forward,
    )


@contextmanager
def _tracked(trunk: nn.Module, hidden: Tensor) -> Iterator[MemTracker]:
    tracker = MemTracker()
    tracker.track_external(trunk, hidden)
    with tracker:
        yield tracker


def _bytes(tracker: MemTracker, kind: str) -> int:
    """All that lives, or lived at the largest moment."""
    snapshot = tracker.get_tracker_snapshot(kind)
    return max((sizes["Total"] for sizes in snapshot.values()), default=0)
