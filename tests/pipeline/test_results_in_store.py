"""What several runs, a fine-tuning and an export leave in an object store; and who reads it there.

The store is fsspec's in the memory of this process, which needs no server, or an empty one that
REKINDLE_TEST_STORE names (gs://bucket). Other machines are other folders of copies.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from safetensors.torch import load_file

from rekindle.data.errors import InputError
from rekindle.data.storage.copies import FOLDER_VARIABLE, copies
from rekindle.data.storage.folders import UNFINISHED
from rekindle.data.storage.object_store import ObjectStore
from rekindle.train.finetune import run as finetuning
from rekindle.train.model.folder import base_of, resolve_model
from rekindle.train.record.working_copy import local_folder
from testlib.command import pipeline

STEPS = 2


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, configure, make_model, wordpiece, one_thread) -> Path:
    """A run without teachers, its cache made; a checkpoint at every step."""
    from rekindle.pipeline.caching.cache_teachers import cache_teachers
    from rekindle.pipeline.config import load_config
    from testlib.servers.plain_runs import write_run

    folder = tmp_path_factory.mktemp("run")
    train = {"steps": STEPS, "batch_sequences": 4, "warmup_steps": 1}
    train |= {"checkpoint_every": 1, "keep_checkpoints": 1, "keep_best": None}
    student = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    file = write_run(folder, configure(folder / "cache", []), student, train)
    cache_teachers(load_config(file))
    return file


@pytest.fixture(scope="module")
def stored() -> Iterator[str]:
    """The address of an empty store."""
    yield os.environ.get("REKINDLE_TEST_STORE", "memory://bucket")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def other_machine(tmp_path, monkeypatch) -> Callable[[], None]:
    """Call it, and no local copy is known any more."""
    return lambda: monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "another-machine"))


def ending_at(monkeypatch: pytest.MonkeyPatch, call: str, place: str) -> pytest.MonkeyPatch:
    """The store is away for good when ``call`` is of an object whose address ends in ``place``."""
    real = getattr(ObjectStore, call)

    def away(self: ObjectStore, *given: Any) -> Any:
        name = given[-1] if call == "upload" else given[0]
        if f"{self.location}/{name}".endswith(place):
            raise InputError(f"cannot reach {self.location}/{name}")
        return real(self, *given)

    monkeypatch.setattr(ObjectStore, call, away)
    return monkeypatch


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)


def nothing_is_left(address: str) -> bool:
    place = local_folder(Path(address))
    return not [*place.parent.glob(f"{place.name}*"), *place.parent.glob(f".{place.name}.s*")]


def test_a_sweep_goes_on_elsewhere_and_is_compared(stored, run_file, monkeypatch, other_machine):
    local, address = run_file.parent / "sweep", f"{stored}/sweep"
    sweep = ["--sweep", "train.seed=1,2"]
    alone = pipeline("train-student", run_file, "--out", local, *sweep)
    assert alone.returncode == 0, alone.stderr
    with monkeypatch.context() as patch:
        ending_at(patch, "create", "seed=2/checkpoints/step-00000002.json")
        failed = pipeline("train-student", run_file, "--out", address, *sweep)
    assert failed.returncode == 2
    assert f"1 of 2 students failed. seed=2: cannot reach {stored}" in failed.stderr
    assert str(copies().root / ".runs" / "sweep-") not in failed.stderr.replace("worked on in", "")
    refused = pipeline("train-student", run_file, "--out", address, *sweep)
    assert refused.returncode == 2
    assert f"{address} is not empty. Give another --out, or --resume" in refused.stderr

    other_machine()
    trained = list[str]()
    download = ObjectStore.download

    def counted(self: ObjectStore, name: str, into: Path) -> None:
        trained.append(f"{self.location}/{name}")
        download(self, name, into)

    monkeypatch.setattr(ObjectStore, "download", counted)
    done = pipeline("train-student", run_file, "--out", address, *sweep, "--resume")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 students are finished" in done.stderr
    assert f"resuming {address}/seed=2 at step 1" in done.stderr
    assert f"{address}/seed=1/model.safetensors" not in trained  # nobody goes on from it
    assert nothing_is_left(address)
    for name in ("seed=1", "seed=2"):
        assert same_weights(resolve_model(f"{address}/{name}"), local / name)

    ours, theirs = (json.loads(pipeline("compare", p, "--json").stdout) for p in (address, local))
    assert [run["directory"] for run in ours["runs"]] == [
        f"{address}/seed=1",
        f"{address}/seed=2",
    ]
    for run, other in zip(ours["runs"], theirs["runs"], strict=True):
        assert (run["name"], run["evaluation"]) == (other["name"], other["evaluation"])
    page = run_file.parent / "page.html"
    both = pipeline("compare", f"{address}/seed=1", local / "seed=2", "--out", page)
    assert both.returncode == 0, both.stderr
    assert str(copies().root) not in both.stdout + page.read_text()
    strange = pipeline("compare", f"{stored}/sweep/seed=1/checkpoints")
    assert strange.returncode == 2
    assert (
        f"no run and no sweep of `pipeline train-student`: {stored}/sweep/seed=1" in strange.stderr
    )


def test_stages_go_on_elsewhere_and_take_models_by_their_addresses(
    stored, run_file, monkeypatch, other_machine
):
    values = yaml.safe_load(run_file.read_text())
    second = {"name": "second", "set": {"student.model": "{first}", "train.seed": 5}}
    values["stages"] = [{"name": "first", "set": {"train.seed": 4}}, second]
    file, address = run_file.with_name("stages.yaml"), f"{stored}/stages"
    file.write_text(yaml.safe_dump(values))
    local = run_file.parent / "stages"
    assert pipeline("train-student", file, "--out", local).returncode == 0
    with monkeypatch.context() as patch:
        ending_at(patch, "create", "second/checkpoints/step-00000002.json")
        assert pipeline("train-student", file, "--out", address).returncode == 2
    other_machine()
    done = pipeline("train-student", file, "--out", address, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"stage first is finished: {address}/first" in done.stderr
    assert f"resuming {address}/second at step 1" in done.stderr
    assert same_weights(resolve_model(f"{address}/second"), local / "second")
    left = yaml.safe_load(ObjectStore(address).read_bytes("second/run.yaml"))
    assert left["student"]["model"] == f"{address}/first"
    assert nothing_is_left(address)
    again = pipeline("train-student", file, "--out", address, "--resume")
    assert again.stdout == f"{address}: every stage was finished\n"


def test_prompts_of_stages_in_a_store_are_to_be_local(stored, run_file):
    values = yaml.safe_load(run_file.read_text())
    prompts = {"teacher": "expert", "to": "{first}/prompts.jsonl"}
    values["stages"] = [{"name": "first"}, {"name": "second", "write_prompts": prompts}]
    file, address = run_file.with_name("prompts.yaml"), f"{stored}/prompts"
    file.write_text(yaml.safe_dump(values))
    done = pipeline("train-student", file, "--out", address)
    assert done.returncode == 2
    assert f"write_prompts.to is {address}/first/prompts.jsonl: prompts are" in done.stderr


@pytest.fixture(scope="module")
def task(stored, tmp_path_factory) -> dict[str, list[str]]:
    """Train and dev of a task of two classes: on the disk, and in the store."""
    home = tmp_path_factory.mktemp("task")
    found: dict[str, list[str]] = {"local": [], "stored": []}
    for split, count in (("train", 24), ("dev", 12)):
        rows = [
            {"text": f"the {('river', 'engine')[n % 2]} {n}", "label": n % 2} for n in range(count)
        ]
        file = home / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ObjectStore(f"{stored}/task").upload(file, file.name)
        found["local"] += [f"--{split}", str(file)]
        found["stored"] += [f"--{split}", f"{stored}/task/{file.name}"]
    return found


def test_a_finetuning_whose_upload_was_killed_goes_on_after_its_seeds(
    stored, task, tmp_path, make_model, wordpiece, monkeypatch
):
    bert = make_model("bert", "AutoModelForMaskedLM", wordpiece)
    local, address = tmp_path / "expert", f"{stored}/expert"
    quick = ["--seeds", 2, "--set", "epochs=1", "--set", "batch_size=12"]
    assert pipeline("finetune", bert, *task["local"], "--out", local, *quick).returncode == 0
    typed = ["finetune", bert, *task["stored"], "--out", address, *quick]
    with monkeypatch.context() as patch:
        ending_at(patch, "upload", "expert/model.safetensors")
        assert pipeline(*typed).returncode == 2
    for reader in (["evaluate", address, "--test", task["local"][3]], ["export", address]):
        half = pipeline(*reader, *(["--out", tmp_path / "x"] if reader[0] == "export" else []))
        assert half.returncode == 2
        assert f"{address} is not complete" in half.stderr
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "_run_seed", None)  # no seed is trained again
        done = pipeline(*typed)
    assert done.returncode == 0, done.stderr
    assert f"expert: {address}\n" in done.stdout
    assert f"pipeline evaluate {address} --test FILE" in done.stderr
    assert same_weights(resolve_model(address), local)
    store = ObjectStore(address)
    assert {*store.names("")} == {path.name for path in local.iterdir()}
    assert not store.exists(UNFINISHED)
    assert nothing_is_left(address)

    kept = pipeline(*typed)
    assert kept.returncode == 2
    assert f"'{address}' holds an earlier result" in kept.stderr
    store.replace("left-over.json", b"{}")
    scored = pipeline(*typed[:-6], "--force", "--set", "epochs=1", "--set", "batch_size=12")
    assert scored.returncode == 0, scored.stderr
    assert "left-over.json" not in store.names("")
    assert len(json.loads(store.read_bytes("metrics.json"))["per_seed"]) == 1


def test_a_result_is_not_written_where_another_machine_writes(stored, task, monkeypatch):
    address = f"{stored}/contended"
    store = ObjectStore(address)
    store.create(UNFINISHED, b'{"process": 7, "host": "elsewhere"}')
    monkeypatch.setattr(finetuning, "read_task", None)  # refused before anything is read
    done = pipeline("finetune", "any", *task["stored"], "--out", address)
    assert done.returncode == 2
    assert f"{address}: process 7 on elsewhere is uploading a result there" in done.stderr
    store.discard(UNFINISHED)
    store.replace("theirs.bin", b"")
    monkeypatch.undo()
    done = pipeline("finetune", "any", *task["stored"], "--out", address)
    assert done.returncode == 2
    assert f"'{address}' exists and is not a result of this command" in done.stderr


def test_an_export_to_a_store_is_that_to_a_folder(stored, make_model, wordpiece, tmp_path):
    from rekindle.data.corpus.tokenizer import load_tokenizer
    from rekindle.train.config import StudentConfig
    from rekindle.train.model.network import HeadConfig
    from rekindle.train.student import build_student

    bert, tokenizer = (
        make_model("bert", "AutoModelForMaskedLM", wordpiece),
        load_tokenizer(str(wordpiece)),
    )
    single = "single_label_classification"
    head = HeadConfig(kind="sequence", num_labels=2, label_names=("a", "b"), problem=single)
    config = StudentConfig(model=str(bert), task="masked_lm")
    student = build_student(config, {"of": head}, tokenizer.size, 0, 12, ["d"], tokenizer)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save(str(tmp_path / "student"))
    for out in (tmp_path / "export", f"{stored}/export"):
        done = pipeline("export", tmp_path / "student", "--out", out)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"exported: {out}\n"
    assert "in a local copy of that folder" in done.stderr
    store = ObjectStore(f"{stored}/export")
    assert {*store.names("")} == {path.name for path in (tmp_path / "export").iterdir()}
    assert same_weights(resolve_model(f"{stored}/export"), tmp_path / "export")
    assert json.loads(store.read_bytes("export.json"))["out"] == f"{stored}/export"


def test_the_base_of_an_adapter_may_be_in_a_store(stored, make_model, wordpiece, tmp_path):
    for file in make_model("bert", "AutoModelForMaskedLM", wordpiece).iterdir():
        ObjectStore(f"{stored}/base").upload(file, file.name)
    about = {"base_model_name_or_path": f"{stored}/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    assert base_of(tmp_path) == resolve_model(f"{stored}/base")


@pytest.mark.parametrize("command", [("export", "student"), ("train-student", "run.yaml")])
def test_a_store_without_a_conditional_put_is_refused_before_anything(command):
    done = pipeline(*command, "--out", "abfs://container/a")
    assert done.returncode == 2
    assert (
        "abfs://container/a can be read, not written to: no conditional put is known for abfs://"
        in done.stderr
    )
