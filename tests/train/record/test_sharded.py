"""A student in shards on disk: what no process ever holds, and what any number of them reads."""

import json
import os
import shutil
import signal
import time
import weakref
from collections import Counter
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rekindle.data.errors import RekindleError
from rekindle.data.settings import parse_settings
from rekindle.data.storage.addresses import sha256_of
from rekindle.pipeline.exits import errors_as_exit_codes
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.distributed import ParallelStudent, World, join_world
from rekindle.train.interrupts import Interrupted
from rekindle.train.loop import train_student
from rekindle.train.model.network import HeadConfig
from rekindle.train.optimizer import adamw
from rekindle.train.record import sharded
from rekindle.train.record.checkpoint import latest_checkpoint, restore, save_checkpoint
from rekindle.train.record.sharded import divide_into_files, write_student
from rekindle.train.student import Student, build_student
from testlib.models import NARROW, STILL
from testlib.several.forked import end_well, forked_world
from testlib.students import assert_same_run, metrics, weights

slow = pytest.mark.slow
SMALL = 4096  # bytes of a file here
HEADS = {"v1.sense": HeadConfig(kind="sequence", num_labels=3)}
STEPS = 6


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_files_hold_all_in_order_and_no_more_than_they_may(sizes, limit):
    files = divide_into_files(sizes, limit)
    assert [number for file in files for number in file] == list(range(len(sizes)))
    assert all(len(file) < 2 or sum(sizes[n] for n in file) <= limit for file in files)
    for one, other in pairwise(files):  # none could have been one with the next
        assert sum(sizes[n] for n in one) + sizes[other[0]] > limit


# --- in one process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_student(make_model, wordpiece, bytelevel, tmp_path_factory):
    def make(family, seed=0):
        if family == "mixtral":
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
            config = transformers.MixtralConfig(vocab_size=2000, **sizes, **heads)
            model = tmp_path_factory.mktemp("mixtral")
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
        else:
            auto = "AutoModelForMaskedLM" if family == "bert" else "AutoModelForCausalLM"
            model = make_model(family, auto, wordpiece if family == "bert" else bytelevel)
        task = "masked_lm" if family == "bert" else "causal_lm"
        return build_student(StudentConfig(model=str(model), task=task), HEADS, 0, seed)

    return make


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("as_held", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral"])
def test_what_is_written_in_pieces_is_what_is_written_at_once(
    make_student, tmp_path, family, as_held
):
    """To the byte in one file; in several, what transformers loads is the same, tied or not."""
    student = make_student(family)
    for name in ("once", "one", "several"):
        (tmp_path / name).mkdir()
    student.save_pretrained(tmp_path / "once", {"by": "me"}, as_held=as_held)
    alone = ParallelStudent(student, World.alone())
    options = {"about": {"by": "me"}, "as_held": as_held}
    write_student(alone, tmp_path / "one", **options)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "once")
    digests = write_student(alone, tmp_path / "several", **options, limit=SMALL)
    assert len(digests) > 2
    assert not (tmp_path / "several/model.safetensors").exists()
    assert all(sha256_of(tmp_path / "several" / n) == one for n, one in digests.items())
    kept = load_file(tmp_path / "once/model.safetensors")
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == kept.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in kept.values())
    again = type(student.model).from_pretrained(tmp_path / "several")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in student.model.state_dict().items())
    assert Student.from_pretrained(tmp_path / "several").head_configs == student.head_configs


def test_a_student_whose_files_have_other_names_goes_on(make_student, tmp_path):
    """Mixtral's published files have each expert by itself."""
    student = make_student("mixtral")
    optimizer = adamw(student.parameters(), 1e-2, 0.01)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    alone = ParallelStudent(student, World.alone())
    path = save_checkpoint(tmp_path, 1, alone, optimizer, {}, keep=1)
    other = make_student("mixtral", seed=1)
    fresh = adamw(other.parameters(), 1e-2, 0.01)
    assert restore(tmp_path, ParallelStudent(other, World.alone()), fresh, 1)["step"] == 1
    found, expected = other.state_dict(), student.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in student.model.state_dict().items())


# --- in several -----------------------------------------------------------------------------------


class Watched:
    """What this process holds of others' rows, and reads of files."""

    def __init__(self):
        sharded.LEAST = sharded.LARGEST = SMALL
        self.held = self.peak = 0
        self.read = Counter()
        whole, fill = sharded.full_tensor, sharded._fill_rows

        def counted_whole(tensor):
            found = whole(tensor)
            if found is not tensor:
                self.held += found.nbytes
                self.peak = max(self.peak, self.held)
                weakref.finalize(found, self.let_go, found.nbytes)
            return found

        def counted_fill(home, stored, key):
            fill(home, Slices(stored, self.read), key)

        sharded.full_tensor, sharded._fill_rows = counted_whole, counted_fill

    def let_go(self, size):
        self.held -= size


def as_of_step_2(whole, broken):
    """A copy of a finished run without what it left after its second step."""
    shutil.copytree(whole, broken)
    (broken / "summary.json").unlink()
    for later in (3, 4, 6):
        shutil.rmtree(broken / f"checkpoints/step-{later:08d}")


def die(file):
    os.kill(os.getpid(), signal.SIGKILL)


class Slices:
    """Counts the bytes that are read of each tensor."""

    def __init__(self, stored, read):
        self.stored, self.read = stored, read

    def get_tensor(self, key):
        found = self.stored.get_tensor(key)
        self.read[key] += found.nbytes
        return found

    def get_slice(self, key):
        rows = self.stored.get_slice(key)

        class Rows:
            def __getitem__(_, wanted):
                found = rows[wanted]
                self.read[key] += found.nbytes
                return found

        return Rows()


VALUES = {
    "parallel": "fsdp",
    "steps": STEPS,
    "batch_sequences": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "checkpoint_every": 2,
    "keep_checkpoints": 9,
    "evaluate_every": 3,
    "evaluate_sequences": 7,
    "held_out": 0.1,
    "objective": {"distill": [{"teachers": ["big"]}, {"teachers": ["sense"], "weight": 0.2}]},
}


@pytest.fixture(scope="module", params=[(2, 1, 2), pytest.param((4, 2, 1, 4), marks=slow)], ids=str)
def chain(request, masked_world, make_model, wordpiece, tmp_path_factory):
    """A run of some numbers of processes one after another; what each of them saw."""
    folder = tmp_path_factory.mktemp("sharded")
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **NARROW, **STILL)
    student = StudentConfig(model=str(model))

    def train(out, world, stop=None):
        def report(step, values):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        config = parse_settings(TrainConfig, VALUES)
        options = {"resume": True, "report": report, "world": world}
        try:
            train_student(masked_world.open(), student, config, folder / out, **options)
        except Interrupted:
            assert stop is not None

    def several(processes, work):
        def run():
            torch.set_num_threads(1)
            watched = Watched()
            with errors_as_exit_codes(), join_world() as world:
                work(world)
                seen = {"peak": watched.peak, "read": sum(watched.read.values())}
                (folder / f"seen-{world.rank}.json").write_text(json.dumps(seen))

        return forked_world(run, processes)

    def first(world):
        train("whole", world)
        world.decide(lambda: as_of_step_2(folder / "whole", folder / "broken"))
        train("broken", world)
        if world.rank == 1:  # while the checkpoint of step 4 is written
            sync = sharded.sync
            sharded.sync = lambda file: die(file) if "step-00000004" in f"{file}" else sync(file)
        train("run", world)

    begin, *middle, end = request.param
    children = several(begin, first)
    codes = [child.wait(300) for child in children]
    (folder / "killed.json").write_text(json.dumps([codes, [c.errors for c in children]]))
    shutil.copytree(folder / "run/checkpoints", folder / "after-the-kill")
    for stop, processes in enumerate(middle, start=4):
        if processes == 1:
            train("run", World.alone(), stop)
        else:
            end_well(several(processes, lambda world, stop=stop: train("run", world, stop)))

    def build(world):
        with open(folder / "turns", "a") as turns:
            for what in ("begins", "ends"):
                turns.write(f"{world.rank} {what}\n")
                turns.flush()
                time.sleep(0.1)
        return world.rank

    def last(world):
        assert world.in_turn(lambda: build(world)) == world.rank
        with pytest.raises(RekindleError) as caught:
            train(f"of-{world.rank}", world)
        (folder / f"unshared-{world.rank}").write_text(str(caught.value))
        train("run", world)

    end_well(several(end, last))
    train("alone", World.alone())
    return folder


def test_as_many_processes_go_on_to_the_same_bits(chain):
    assert metrics(chain / "broken") == metrics(chain / "whole")
    for step in (2, 4, 6):
        one, other = (chain / n / f"checkpoints/step-{step:08d}" for n in ("broken", "whole"))
        assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
        for file in other.glob("*.safetensors"):
            assert file.read_bytes() == (one / file.name).read_bytes()


def test_other_numbers_of_processes_go_on_to_the_same_student(chain):
    """Begun in several, killed, gone on with in others, held against one process's run."""
    assert_same_run(chain / "run", chain / "alone")
    assert_same_run(chain / "whole", chain / "alone")


def test_a_process_that_is_killed_while_it_writes_leaves_the_former_checkpoint(chain):
    codes, errors = json.loads((chain / "killed.json").read_text())
    assert codes[1] == -signal.SIGKILL
    for code, said in zip(codes, errors, strict=True):
        assert code == -signal.SIGKILL or (code == 1 and "another process" in said)
    left = [path.name for path in (chain / "after-the-kill").iterdir()]
    assert sorted(name for name in left if name[0] != ".") == ["step-00000002", "step-00000003"]
    assert not [path for path in (chain / "run/checkpoints").iterdir() if path.name[0] == "."]


def size_of(tensors):
    return sum(t.nbytes for t in tensors.values())


def test_no_process_holds_more_than_a_file_and_a_tensor_or_reads_the_rows_of_others(chain):
    folder = chain / "whole/checkpoints/step-00000004"
    files = [load_file(file) for file in folder.glob("*-of-*")]
    assert len(files) > 8
    largest = max(t.nbytes for tensors in files for t in tensors.values())
    total = sum(map(size_of, files))
    seen = [json.loads(file.read_text()) for file in chain.glob("seen-*.json")]
    assert len(seen) in (2, 4)
    for one in seen:  # of the last processes, which have read one checkpoint
        assert 0 < one["peak"] <= max(map(size_of, files)) + largest
        assert one["read"] <= total / len(seen) * 1.2


@pytest.mark.parametrize("folder", ["run", "run/checkpoints/step-00000006"])
def test_what_is_left_is_a_model_for_transformers(chain, folder):
    found = transformers.AutoModelForMaskedLM.from_pretrained(chain / folder).state_dict()
    kept = weights(chain / folder)
    assert len(list((chain / folder).glob("model-*-of-*.safetensors"))) > 2
    assert all(torch.equal(found[k], v) for k, v in kept.items() if k in found)
    assert Student.from_pretrained(chain / folder).head_configs.keys() == {"sense"}
    assert latest_checkpoint(chain / "run")[1]["step"] == STEPS


def test_a_folder_of_ones_own_is_refused(chain):
    """Before the first step, by the process that does not see the main one's."""
    assert (chain / "unshared-0").read_text() == ""
    assert "all nodes share" in (chain / "unshared-1").read_text()
    assert not (chain / "of-0/run.json").exists()


def test_students_are_built_one_after_another_the_main_one_last(chain):
    """A machine has room for one that is whole."""
    order = range(len(list(chain.glob("seen-*.json"))))[::-1]
    turns = [f"{rank} {what}" for rank in order for what in ("begins", "ends")]
    assert (chain / "turns").read_text().splitlines() == turns
