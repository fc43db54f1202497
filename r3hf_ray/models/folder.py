"""What a model folder, or a name on the hub, says besides its weights: read once, known in one place."""

from functools import cached_property
from pathlib import Path
from typing import Final

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from r3hf_ray.errors import ModelError
from r3hf_ray.models.chat import Chat

NO_LIMIT: Final = 2**31 - 1
"""The window of a model that names none, such as one with ALiBi. [tokens]"""
_WINDOWS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_seq_length",
    "seq_len",
)  # fmt: skip
"""Names under which configurations state their window, as vLLM looks for them."""


class ModelFolder:
    """Configuration, tokenizer, window, chat format and end of answers of one model.

    Example: ``ModelFolder("HuggingFaceTB/SmolLM2-135M-Instruct", "policy").end_ids`` is ``[2]``
    """

    def __init__(self, source: str | Path, kind: str) -> None:
        """Read configuration and tokenizer; the rest is read where it is asked for.

        Args:
            source: folder or hub name.
            kind: what it is for ("policy", "reward model"), used in sentences.

        Raises:
            ModelError: there is no such folder, or no configuration or tokenizer in it.
        """
        self.source, self.kind = str(source), kind
        self.config = read_config(source, kind)
        self.tokenizer = load_tokenizer(source)

    @cached_property
    def chat(self) -> Chat:
        """How dialogues become token ids.

        Raises:
            DataError: the chat template cannot be used.
        """
        return Chat(self.tokenizer)

    @property
    def window(self) -> int:
        """Longest sequence the model can read; `NO_LIMIT` where its configuration names none. [tokens]"""
        return window(self.config)

    @cached_property
    def end_ids(self) -> list[int]:
        """Every id that ends an answer: tokenizer's, model's, generation config's, then the chat template's.

        Raises:
            ModelError: there is none, so that no answer could ever finish.
            DataError: the chat template cannot be used.
        """
        try:
            generation = GenerationConfig.from_pretrained(self.source)
        except OSError:  # a model folder need not have one
            generation = None
        told = self.chat.end_id if self.tokenizer.chat_template is not None else None
        named = eos_ids(self.tokenizer, self.config, generation, required=told is None)
        return list(dict.fromkeys([*named, *([] if told is None else [told])]))

    @property
    def pad_id(self) -> int:
        """An id to fill rows with: the tokenizer's padding where the model has a row for it, else an end."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None and pad < self.config.get_text_config().vocab_size else self.end_ids[0]

    @property
    def unknown_ids(self) -> list[int]:
        """Ids that the model has a row for and the tokenizer no token: padding of the vocabulary, not to be sampled."""
        return unknown_ids(self.tokenizer, self.config.get_text_config().vocab_size)

    def require_language_model(self) -> None:
        """Refuse a classifier before its weights are read; `load_policy` looks at those.

        Raises:
            ModelError: its configuration says that it is one.
        """
        classifiers = [name for name in self.config.architectures or () if "Classification" in name]
        if classifiers:
            raise ModelError(
                f"{self.source}: is a {classifiers[0]}, as reward models are, and no {self.kind}; name a language model"
            )

    def name_ends(self, model: PreTrainedModel) -> None:
        """Put every end of an answer into the model's generation config, which is saved with it."""
        model.generation_config.eos_token_id = self.end_ids if len(self.end_ids) > 1 else self.end_ids[0]

    def settle_tokens(self, model: PreTrainedModel) -> None:
        """Before training: name every end, and give tokenizer, config and generation config one pad that is none.

        With ``pad == eos`` transformers pools a classifier one token early and training masks EOS away. A pad token
        that is already distinct is kept; else an unused special token is taken; else one is added and the embedding
        grows.
        """
        tokenizer, generates = self.tokenizer, model.can_generate()
        if generates:
            self.name_ends(model)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id in self.end_ids:
            spare = _spare_special_token(tokenizer, self.end_ids)
            if spare is None:
                tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            else:
                tokenizer.pad_token = spare
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if generates:
            model.generation_config.pad_token_id = tokenizer.pad_token_id


def check_folder(source: str | Path, kind: str) -> None:
    """Refuse a local path that holds no model; anything that does not look like a path is left to the hub.

    Args:
        source: folder or hub name.
        kind: what it is for ("policy", "reward model"), used in the sentence.

    Raises:
        ModelError: the folder is absent or has no config.json.
    """
    path = Path(source)
    looks_local = path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2
    if not path.exists() and looks_local:
        raise ModelError(f"{source}: no such folder for the {kind}; train it first or name another")
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{source}: no model folder (no config.json); name a folder that transformers saved as {kind}")


def absolute(source: str) -> str:
    """A local folder as an absolute path, since Ray's workers run in another directory; a hub name stays as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def read_config(source: str | Path, kind: str) -> PreTrainedConfig:
    """The configuration of a model.

    Raises:
        ModelError: there is none that transformers knows.
    """
    check_folder(source, kind)
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # whatever a library makes of a stranger's file
        raise ModelError(f"{source}: cannot be loaded as {kind}: {first_line(error)}") from error


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model folder.

    Raises:
        ModelError: there is none.
    """
    check_folder(source, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever a library makes of a stranger's file
        raise ModelError(f"{source}: no tokenizer ({first_line(error)}); save it beside the model") from error


def window(config: PreTrainedConfig) -> int:
    """Longest sequence a model can read; `NO_LIMIT` where its configuration names none. [tokens]"""
    text = config.get_text_config()
    said = text.to_dict()
    if said.get("model_max_length"):  # Command R's, which stands above its max_position_embeddings
        return int(said["model_max_length"])
    names = [text.attribute_map.get(name, name) for name in _WINDOWS]
    return min((int(said[name]) for name in names if said.get(name)), default=NO_LIMIT)


def unknown_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Those of ``rows`` ids that are no token of the tokenizer.

    Example: of Qwen2.5's 151,936 rows, the last 271
    """
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def eos_ids(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None = None,
    *,
    required: bool = True,
) -> list[int]:
    """Every id called end of sequence: the tokenizer's, the model's and its generation config's, in that order.

    Raises:
        ModelError: there is none and one is ``required``, as no answer could ever finish.
    """
    named = [tokenizer.eos_token_id, config.get_text_config().eos_token_id]
    named += [generation_config.eos_token_id] if generation_config is not None else []
    ids: dict[int, None] = {}
    for value in named:
        ids.update(dict.fromkeys(value if isinstance(value, list) else [value] if value is not None else []))
    if required and not ids:
        raise ModelError(f"{tokenizer.name_or_path}: no end-of-sequence token; set eos_token in its tokenizer")
    return list(ids)


def check_same_vocabulary(policy_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    """The frozen reference, and an audited reward model, read the sampled ids, which must mean the same to them.

    Raises:
        ModelError: the vocabularies differ.
    """
    ours, theirs = policy_tokenizer.get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        different = sum(theirs.get(token) != index for token, index in ours.items()) + len(theirs.keys() - ours.keys())
        raise ModelError(
            f"{tokenizer.name_or_path}: its vocabulary differs from the policy's in {different} tokens; "
            "use a model trained from the same base"
        )


def knows_ids(tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the two vocabularies are one, but for tokens added to this one (a pad token)."""
    ours, theirs = policy_tokenizer.get_vocab().items(), tokenizer.get_vocab().items()
    return ours <= theirs and theirs - ours <= tokenizer.get_added_vocab().items()


def first_line(error: Exception) -> str:
    """What an error of a library says first."""
    return str(error).strip().split("\n")[0]


def _spare_special_token(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> str | None:
    taken = {*ends, tokenizer.bos_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    unused = [t for t in special if tokenizer.convert_tokens_to_ids(t) not in taken and t not in template]
    return next((t for t in unused if "pad" in t.lower()), unused[0] if unused else None)
