"""Students that are built in shards: the same bits as in one process, and what a process holds."""

import json
import re
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rekindle.train.config import StudentConfig
from rekindle.train.deferred.recording import Undeferrable, recording
from rekindle.train.distributed import ParallelStudent, full_tensor, join_world
from rekindle.train.model.network import HeadConfig
from rekindle.train.student import build_student
from testlib.several.forked import end_well, forked_world

slow = pytest.mark.slow
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
DEEP = SIZES | {"num_hidden_layers": 4, "vocab_size": 60, "pad_token_id": 0}
FAMILIES = {
    "bert": transformers.BertConfig(max_position_embeddings=64, **DEEP),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=60),
    "llama": transformers.LlamaConfig(**DEEP),
    "modernbert": transformers.ModernBertConfig(**DEEP, cls_token_id=1, sep_token_id=2),
    "mixtral": transformers.MixtralConfig(num_local_experts=2, num_key_value_heads=2, **DEEP),
}
QUICK = ["bert-family", "gpt2-new", "llama", "modernbert-new"]
EVERY = [*FAMILIES, *(f"{family}-new" for family in FAMILIES), "bert-family"]
HEADS = {"v1.sense": HeadConfig(kind="sequence", num_labels=3)}


@dataclass
class Meter(TorchDispatchMode):
    """The most bytes that tensors on the CPU held at once, of those that operators have seen."""

    held: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)
    most: int = 0

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, made)):
            seen = one._local_tensor if isinstance(one, DTensor) else one
            if type(seen) in (torch.Tensor, nn.Parameter) and seen.device.type == "cpu":
                self.see(seen.untyped_storage())
        return made

    def see(self, storage):
        if storage._cdata in self.held and not self.held[storage._cdata][0].expired():
            return
        self.held = {key: one for key, one in self.held.items() if not one[0].expired()}
        self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.held.values()))


def config_of(folder, name):
    """The student of a folder: bert-new is one of its configuration alone."""
    family, _, how = name.partition("-")
    task = "masked_lm" if "bert" in family else "causal_lm"
    more = {"head": "family", "domain_prompts": True} if how == "family" else {}
    return StudentConfig(model=str(folder / family), task=task, from_scratch=how == "new", **more)


def build(folder, name):
    return build_student(config_of(folder, name), HEADS, 0, seed=3, domains=("law", "news"))


def tensors_of(student):
    return dict(student.state_dict()) | dict(student.named_buffers())


def compare(folder, name, world):
    """How a student in shards differs from one in a process, and what it took to build them."""
    mesh = world.mesh("fsdp")
    with Meter() as usual:
        before = build(folder, name)
    with Meter() as meter:
        with recording() as recorded:
            student = build(folder, name)
        trials, recorded.trials = recorded.trials, []
        made = ParallelStudent(student, world, mesh, recorded)
    made.run(lambda _: [trial() for trial in trials])
    made.module.reshard()
    found, expected = tensors_of(made.student), tensors_of(before)
    wrong = sorted(found.keys() ^ expected.keys())
    wrong += [
        k for k, v in expected.items() if k in found and not torch.equal(full_tensor(found[k]), v)
    ]
    ids = torch.arange(10, 30).reshape(2, 10)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    select, heads = torch.arange(5), ["v1.sense"]
    with torch.no_grad():
        there = made.run(lambda own: own.eval()(inputs, select, heads))
        here = before.eval()(inputs, select, heads)
    torch.testing.assert_close(there.hidden, here.hidden)
    torch.testing.assert_close(there.logits, here.logits)
    tied = [
        m.get_input_embeddings().weight is m.get_output_embeddings().weight
        for m in (made.student.model, before.model)
    ]
    own = [v._local_tensor if isinstance(v, DTensor) else v for v in found.values()]
    storages = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in own}
    return {
        "wrong": wrong,
        "tied": tied,
        "usual": usual.most,
        "most": meter.most,
        "own": sum(storages.values()),
        "largest": max(v.nbytes for v in expected.values()),
    }


@pytest.fixture(
    scope="module", params=[(2, QUICK), pytest.param((4, EVERY), marks=slow)], ids=["2", "4"]
)
def seen(request, tmp_path_factory, one_thread):
    """By name of the student: what each process says of it."""
    folder = tmp_path_factory.mktemp("students")
    for family, config in FAMILIES.items():
        auto = "AutoModelForMaskedLM" if "bert" in family else "AutoModelForCausalLM"
        torch.manual_seed(1)
        getattr(transformers, auto).from_config(config).save_pretrained(folder / family)
    processes, named = request.param

    def work():
        with join_world() as world:
            found = {name: compare(folder, name, world) for name in named}
            (folder / f"seen-{world.rank}.json").write_text(json.dumps(found))

    end_well(forked_world(work, processes))
    files = [folder / f"seen-{rank}.json" for rank in range(processes)]
    each = [json.loads(file.read_text()) for file in files]
    return {name: [one[name] for one in each] for name in named}


def test_weights_and_buffers_are_those_of_one_process(seen):
    """To the bit, whether they come from files or are drawn; tied ones are one tensor."""
    for name, each in seen.items():
        for one in each:
            assert one["wrong"] == [], name
            assert one["tied"][0] == one["tied"][1], name


def test_no_process_holds_more_than_its_shard_and_a_tensor(seen):
    """Truncated normal distributions take what torch's function takes beside its tensor; of an
    new embedding whose padding is set to zero there are two for a moment.
    """
    beside = {"modernbert-new": 5, "mixtral": 3, "mixtral-new": 3, "bert-new": 2, "llama-new": 2}
    for name, each in seen.items():
        for one in each:
            tensors = beside.get(name, 1)
            most = 1.01 * (one["own"] + tensors * one["largest"])  # FSDP2 pads what is uneven
            assert one["most"] <= most, (name, one)
            assert one["usual"] > most, (name, one)  # the meter does see what is held


def test_what_looks_at_values_cannot_be_recorded():
    with pytest.raises(Undeferrable, match=re.escape("_local_scalar_dense")), recording():
        nn.Linear(2, 2).weight.sum().item()
    assert torch._C._len_torch_dispatch_stack() == 0
