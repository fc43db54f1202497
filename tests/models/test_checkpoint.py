import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from r3hf_ray.errors import CheckpointError
from r3hf_ray.models import checkpoint
from r3hf_ray.models.folder import load_tokenizer
from r3hf_ray.models.load import load_policy
from r3hf_ray.models.logprobs import Policy
from r3hf_ray.models.sharding import full_parameters, make_mesh, shard


def rows(rank=0, world=1):
    ids = torch.randint(2, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    attention = torch.ones(4, 9, dtype=torch.bool)
    return [x[rank::world] for x in (ids, attention, attention & (torch.arange(9) >= 3))]


def make(folder, world):
    policy = Policy(load_policy(folder, torch.float32)).eval()
    shard(policy, make_mesh(world, "cpu") if world > 1 else None, blocks="never", dtype=torch.float32)
    return policy, AdamW(policy.parameters(), lr=1e-2)


def train(policy, optimizer, steps, rank=0, world=1):
    for _ in range(steps):
        policy(*rows(rank, world), temperature=1.0).sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


def parameters(policy):
    return {name: x.numpy().copy() for name, x in full_parameters(policy.model)}


def equal(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def saved_and_continued(model, folder, rank, world):
    policy, optimizer = make(model, world)
    train(policy, optimizer, 2, rank, world)
    checkpoint.save(folder, modules={"policy": policy}, optimizers={"policy": optimizer}, extra={"step": 2})
    middle = parameters(policy)
    train(policy, optimizer, 2, rank, world)
    return middle, parameters(policy)


def loaded_and_continued(model, folder, rank, world):
    policy, optimizer = make(model, world)
    with torch.no_grad():
        policy(*rows(rank, world), temperature=1.0)  # a forward before loading must not keep old weights
    extra = checkpoint.load(folder, modules={"policy": policy}, optimizers={"policy": optimizer})
    middle = parameters(policy)
    train(policy, optimizer, 2, rank, world)
    return extra, middle, parameters(policy)


@pytest.mark.parametrize("model", ["policy", "tied"])
def test_going_on_after_a_load_is_bitwise_the_same(tiny_models, tmp_path, model):
    folder = tiny_models._asdict()[model]
    middle, end = saved_and_continued(folder, tmp_path / "c", 0, 1)
    assert not equal(middle, end)
    extra, again, later = loaded_and_continued(folder, tmp_path / "c", 0, 1)
    assert extra == {"step": 2}
    assert equal(again, middle) and equal(later, end)


def test_two_ranks_and_then_one(tiny_models, tmp_path, run_ranks):
    policy, folder = tiny_models.tied, tmp_path / "c"
    saved = run_ranks(lambda rank: saved_and_continued(policy, folder, rank, 2))
    loaded = run_ranks(lambda rank: loaded_and_continued(policy, folder, rank, 2))
    for (middle, end), (extra, again, later) in zip(saved, loaded, strict=True):
        assert extra == {"step": 2} and equal(again, middle) and equal(later, end)
    _, again, later = loaded_and_continued(policy, folder, 0, 1)
    assert equal(again, saved[0][0])
    for name, x in later.items():  # other shards, other rounding
        torch.testing.assert_close(torch.from_numpy(x), torch.from_numpy(saved[0][1][name]), rtol=1e-4, atol=1e-4)


def test_nothing_is_pickled(tiny_models, tmp_path):
    saved_and_continued(tiny_models.policy, tmp_path / "c", 0, 1)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert [name for name in names if not name.endswith(".safetensors")] == ["extra.json"]


def test_a_folder_is_never_written_twice(tiny_models, tmp_path):
    saved_and_continued(tiny_models.policy, tmp_path / "c", 0, 1)
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        saved_and_continued(tiny_models.policy, tmp_path / "c", 0, 1)


def test_unusable_checkpoints_are_one_sentence(tiny_models, tmp_path):
    policy, optimizer = make(tiny_models.policy, 1)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.load(tmp_path, modules={"policy": policy}, optimizers={"policy": optimizer})
    saved_and_continued(tiny_models.tied, tmp_path / "c", 0, 1)
    with pytest.raises(CheckpointError, match="not a checkpoint of these models"):
        checkpoint.load(tmp_path / "c", modules={"policy": policy}, optimizers={"policy": optimizer})


def write(policy, source, folder, dtype=torch.float32):
    checkpoint.save_pretrained(
        full_parameters(policy.model),
        folder,
        config=policy.model.config,
        generation_config=policy.model.generation_config,
        tokenizer=load_tokenizer(source),
        dtype=dtype,
    )


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("model", ["policy", "tied"])
def test_transformers_loads_the_saved_folder(tiny_models, tmp_path, run_ranks, world, model):
    source, folder = tiny_models._asdict()[model], tmp_path / "model"

    def on_a_rank(rank):
        policy, optimizer = make(source, world)
        train(policy, optimizer, 1, rank, world)
        write(policy, source, folder)
        return parameters(policy)

    expected = run_ranks(on_a_rank, world=world)[0]
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (model == "tied") == json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert equal({name: x.numpy() for name, x in full_parameters(loaded)}, expected)
    assert loaded.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == load_tokenizer(source).get_vocab()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_saving_replaces_an_older_folder_whole(tiny_models, tmp_path):
    folder = tmp_path / "model"
    policy, optimizer = make(tiny_models.policy, 1)
    write(policy, tiny_models.policy, folder)
    (folder / "stale.txt").write_text("left over")
    train(policy, optimizer, 1)
    write(policy, tiny_models.policy, folder, torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not (folder / "stale.txt").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, policy.model.lm_head.weight.bfloat16())


def test_an_interrupted_save_leaves_the_older_folder(tiny_models, tmp_path):
    folder = tmp_path / "model"
    policy, _ = make(tiny_models.policy, 1)
    write(policy, tiny_models.policy, folder)
    before = (folder / "model.safetensors").read_bytes()

    def breaks():
        yield from list(full_parameters(policy.model))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_pretrained(
            breaks(),
            folder,
            config=policy.model.config,
            generation_config=None,
            tokenizer=load_tokenizer(tiny_models.policy),
        )
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_files_are_those_of_torchs_own_writer(tiny_models, tmp_path, run_ranks):
    def on_a_rank(rank):
        policy, optimizer = make(tiny_models.tied, 2)
        train(policy, optimizer, 1, rank, 2)
        parts = {"modules": {"policy": policy}, "optimizers": {"policy": optimizer}}
        checkpoint.save(tmp_path / "ours", **parts, extra={})
        writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
        dcp.save(checkpoint._tensors(**parts), storage_writer=writer)

    run_ranks(on_a_rank)
    read = {}
    for name in ("ours", "theirs"):
        chunks = {}
        for file in sorted((tmp_path / name).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                where = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
                chunks |= {(key, *where[key]["saved_offsets"]): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        read[name] = chunks
    assert read["ours"].keys() == read["theirs"].keys() and len(read["ours"]) > 20
    assert all(torch.equal(part, read["theirs"][key]) for key, part in read["ours"].items())
