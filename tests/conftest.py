"""Every jaxtyping annotation of r3hf_ray is enforced while tests run. Fixtures: Ray, models, groups of ranks, pages.

`make test` runs files on two workers (pytest-xdist), those that start Ray or an engine first; each worker has one Ray.
"""

import json
import multiprocessing
import os
import pickle
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported, by the tests
install_import_hook("r3hf_ray", "beartype.beartype")
settings.register_profile("fast", deadline=None, max_examples=30)
settings.load_profile("fast")
pytest_plugins = ["made.byte_tokenizer", "made.cases", "made.foreign_tokenizers", "made.token_rows", "made.whole_run"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray or an engine come first, so that two workers end at about the same time."""
    heavy: dict[Path, int] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()} & {"ray", "slow"}
        heavy[item.path] = max(heavy.get(item.path, 0), len(marks))
    items.sort(key=lambda item: -heavy[item.path])


_RAY = ExitStack()


@pytest.fixture(scope="module")
def local_ray() -> None:
    """A Ray of 4 CPUs on this machine, one for all modules of this process: starting it takes 6 s."""
    import ray

    from r3hf_ray.session import ray_session

    if not ray.is_initialized():
        _RAY.enter_context(ray_session(4.0))


def pytest_sessionfinish() -> None:
    """Before the interpreter takes the modules away that an end needs."""
    _RAY.close()


@pytest.fixture
def no_ray() -> None:
    """For tests of what happens before Ray is there."""
    _RAY.close()


class TinyModels(NamedTuple):
    """Model folders of `tiny_models`."""

    policy: Path
    tied: Path
    """The same shape with tied embeddings."""
    reward: Path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """A random two-layer Llama policy, a reward model of the same shape, and their tokenizer, as folders."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(36))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    shape = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.3,
    }
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    made = {
        "policy": LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)),
        "tied": LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)),
        "reward": LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return TinyModels(folder / "policy", folder / "tied", folder / "reward")


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(function, *args, world=2)` calls `function(rank, *args)` in a gloo group; results in rank order.

    Functions travel by value, closures too. The processes fork from a server that has torch and transformers loaded, so
    a group takes a second and not ten, and nothing of this process's torch state comes along.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "ray.cloudpickle"])

    def run(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            pipes = [context.Pipe(duplex=False) for _ in range(world)]
            processes = [
                context.Process(target=_ByValue(_as_rank), args=(send, _ByValue(function), rank, world, folder, args))
                for rank, (_, send) in enumerate(pipes)
            ]
            for process in processes:
                process.start()
            for _, send in pipes:
                send.close()
            try:
                results = [receive.recv() if receive.poll(120) else (False, "no answer") for receive, _ in pipes]
            finally:
                for process in processes:
                    process.kill()
                    process.join()
        failures = [text for worked, text in results if not worked]
        assert not failures, failures[0]
        return [pickle.loads(value) for _, value in results]

    return run


class Page(HTMLParser):
    """Tags with their attributes, the text of each script, and what is read as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in = ""
        self.feed(text)

    @property
    def data(self) -> Any:
        """What the page's own script draws: the JSON of the first one."""
        return json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of HTMLParser."""
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        """Of HTMLParser."""
        self._in = ""

    def handle_data(self, data: str) -> None:
        """Of HTMLParser."""
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.texts.append(data)


@pytest.fixture(scope="session")
def read_page() -> Callable[[Path], Page]:
    """`read_page(file)`: an HTML page as a browser reads it."""
    return lambda path: Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained toy policy in `base` and a random toy reward model in `reward`."""
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    from r3hf_ray.instruments.toy.settings import ToySection
    from r3hf_ray.instruments.toy.world import make_world

    folder = tmp_path_factory.mktemp("toy_world")
    make_world(folder, ToySection(sft_rows=1, train_prompts=1, heldout_prompts=1))
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    model.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "reward")
    return folder


@pytest.fixture(scope="session")
def wandb_history() -> Callable[[Path], list[dict[str, Any]]]:
    """`wandb_history(file)`: the logged rows of an offline wandb file, complete once its service has ended."""
    return lambda path: list(_history(path))


def _history(path: Path) -> Iterator[dict[str, Any]]:
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            yield {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}


def _records(path: Path) -> Iterator[Any]:
    """Records of an offline file: 7 bytes, then 32 KiB blocks of <crc32, length, type> + payload, parts joined."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


class _ByValue:
    """A function that is pickled with its code: the test modules cannot be imported by name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __reduce__(self) -> Any:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[self.function.__module__])
        return cloudpickle.loads, (cloudpickle.dumps(self.function),)


def _as_rank(
    pipe: Any, function: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...]
) -> None:
    import pickle
    import traceback

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        pipe.send((True, pickle.dumps(function(rank, *args))))
    except BaseException:
        pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
        raise
    finally:
        dist.destroy_process_group()
