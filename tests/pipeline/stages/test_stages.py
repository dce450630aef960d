"""Several stages in one file: each is the run it says, whatever happens on the way."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rekindle.data.cache import Cache
from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.caching.repair import repair_cache
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.inspect import inspect_cache
from rekindle.pipeline.compare.runs import compare_runs
from rekindle.pipeline.config import load_config
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.staged import plan_staged_run
from rekindle.pipeline.progress import Progress, ProgressTask
from rekindle.pipeline.stages import run as module
from rekindle.pipeline.stages.run import cache_stages, run_stages
from rekindle.pipeline.sweep.grid import plan_sweep
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.interrupts import Interrupted
from rekindle.train.model.files import weights_fingerprint
from rekindle.train.record.run_folder import locked_folder
from testlib.processes import Child

STEPS = 6
NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def chain(small_corpus, wordpiece, make_model, make_teacher):
    """chain(home, **changes) -> a run file of three stages: large -> first -> second -> third."""
    large = make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 4})
    sizes = {name: {"hidden_size": 16, "intermediate_size": 16 + n} for n, name in enumerate(NAMES)}
    student = {
        name: str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, **size))
        for name, size in sizes.items()
    }

    def follow(name: str, teacher: str, home: Path) -> dict:
        changed = {"student.model": student[name], "teachers.0.model": f"{{{teacher}}}"}
        return {"name": name, "set": changed | {"cache.path": str(home / f"{name}-cache")}}

    def write(home: Path, **sections) -> Path:
        values = {
            "corpus": small_corpus | {"domain_field": None},
            "cache": {"path": str(home / "cache"), "sequences_per_shard": 6, "replicas": 2},
            "teachers": [large],
            "student": {"model": student["first"], "from_scratch": True},
            "train": {
                "steps": STEPS,
                "batch_sequences": 4,
                "warmup_steps": 1,
                "learning_rate": 1e-2,
                "checkpoint_every": 2,
                "evaluate_every": STEPS,
                "held_out": 0.2,
                "objective": {"distill": [{"teachers": ["lm"]}]},
            },
            "stages": [
                {"name": "first", "set": {"train.seed": 3}},
                follow("second", "first", home),
                follow("third", "second", home),
            ],
        }
        home.mkdir(parents=True, exist_ok=True)
        path = home / "chain.yaml"
        path.write_text(yaml.safe_dump(values | sections))
        return path

    return write


@pytest.fixture(scope="module")
def whole(tmp_path_factory, chain):
    """A chain that nothing interrupted: its home, with OUT in it."""
    home = tmp_path_factory.mktemp("whole")
    results = run_stages(load_config(chain(home)), home / "out")
    assert [result.directory.name for result in results] == list(NAMES)
    return home


def weights(run):
    return (run / "model.safetensors").read_bytes() + (run / "heads.safetensors").read_bytes()


def teacher_of(home, stage):
    return Cache.open(home / (f"{stage}-cache" if stage != "first" else "cache")).teacher("lm")


# --- what runs ------------------------------------------------------------------------------------


def test_every_stage_is_the_run_it_says(whole, tmp_path):
    """Cached and trained by hand, with the same values, the first stage is the same to the bit."""
    saved = load_config(whole / "out" / "first" / "run.yaml")
    assert (saved.train.seed, saved.train.steps, saved.stages) == (3, STEPS, ())
    train_from_config(saved, tmp_path / "alone")
    assert weights(tmp_path / "alone") == weights(whole / "out" / "first")
    assert load_config(whole / "out" / "third" / "run.yaml").teachers[0].model == str(
        whole / "out" / "second"
    )


def test_the_teacher_of_a_stage_has_the_weights_of_the_stage_before(whole):
    for stage, before in (("second", "first"), ("third", "second")):
        made = weights_fingerprint(whole / "out" / before)
        assert teacher_of(whole, stage).fingerprint == made
        about = json.loads((whole / "out" / stage / "run.json").read_text())
        assert about["cache"]["teachers"] == {"lm": made}


def test_a_teacher_that_was_a_student_keeps_its_lineage(whole):
    """Oldest run first; the weights of each are the teacher of the next."""
    assert teacher_of(whole, "first").info.lineage == ()
    lineage = teacher_of(whole, "third").info.lineage
    made = [weights_fingerprint(whole / "out" / name) for name in NAMES[:2]]
    large = teacher_of(whole, "first").fingerprint
    corpora = {teacher_of(whole, name).corpus.fingerprint for name in NAMES}
    assert [run.weights for run in lineage] == made
    assert [run.teachers for run in lineage] == [{"lm": large}, {"lm": made[0]}]
    assert [run.steps for run in lineage] == [STEPS, STEPS]
    assert {run.corpus for run in lineage} == corpora
    shown = inspect_cache(str(whole / "third-cache"))
    for run in lineage:
        assert run.weights[:12] in shown
    facts = json.loads(inspect_cache(str(whole / "third-cache"), as_json=True))
    assert facts["teachers"]["lm"]["lineage"] == [run.model_dump() for run in lineage]


def test_a_checkpoint_has_the_lineage_too(whole):
    from rekindle.train.record.lineage import lineage_of_model

    second = whole / "out" / "second"
    checkpoint = min((second / "checkpoints").iterdir())
    (parent, own) = lineage_of_model(checkpoint)
    (same, last) = lineage_of_model(second)
    assert parent == same
    assert own.steps < STEPS == last.steps
    assert own.weights == weights_fingerprint(checkpoint) != last.weights


def test_the_lineage_of_a_student_that_goes_on_from_another(whole, tmp_path, chain, caplog):
    from rekindle.train.record.lineage import lineage_of_model

    path = chain(tmp_path)
    override = ["stages=[]", f"student.model={whole}/out/third", "student.from_scratch=false"]
    config = load_config(path, override)
    cache_teachers(config)
    asked = config.corpus.model_copy(update={"sequence_length": 64})
    train_from_config(config.model_copy(update={"corpus": asked}), tmp_path / "run")
    length = config.corpus.sequence_length
    assert f"has sequence_length {length} (the run file says 64): the cache's is" in caplog.text
    runs = lineage_of_model(tmp_path / "run")
    assert [run.weights for run in runs[:3]] == [
        weights_fingerprint(whole / "out" / name) for name in NAMES
    ]
    assert len(runs) == 4
    assert runs[3].student == str(whole / "out" / "third")


def test_the_lineage_is_no_part_of_what_a_teacher_is(whole, tmp_path):
    """A cache of a time without lineages is recognised, and keeps what it says."""
    cache = tmp_path / "cache"
    shutil.copytree(whole / "third-cache", cache)
    saved = load_config(whole / "out" / "third" / "run.yaml", [f"cache.path={cache}"])
    info = Cache.open(cache).teacher("lm").info
    assert "lineage" not in info.identity()
    (cache / "targets/lm/teacher.json").unlink()
    bare = info.model_copy(update={"lineage": ()})
    from rekindle.data.writing import claim_teacher

    claim_teacher(Cache.open(whole / "third-cache").corpus, bare)  # no mismatch
    (cache / "targets/lm/teacher.json").write_bytes(module_seal(bare))
    assert b"lineage" not in (cache / "targets/lm/teacher.json").read_bytes()
    done = cache_teachers(saved)
    assert (done.units_done, done.units_present) == (0, 4)
    (cache / "targets/lm/teacher.json").unlink()
    from rekindle.data.storage.store import open_store

    repair_cache(open_store(str(cache)), ["lm"], True, Progress.silent())
    assert Cache.open(cache).teacher("lm").info.lineage == info.lineage  # from a shard


def module_seal(info):
    from rekindle.data.storage.seal import seal

    return seal(info.model_dump(mode="json"))


# --- interruptions --------------------------------------------------------------------------------


class Stopping(Progress):
    """Does something when the task of that name has done so many steps."""

    def __init__(self, name, steps, act):
        super().__init__()
        self.name, self.steps, self.act = name, steps, act

    @contextmanager
    def task(self, name, unit, total=None):
        progress = self

        class Watched(ProgressTask):
            def advance(self, amount=1, **counts):
                super().advance(amount, **counts)
                progress.see(name, self.done)

        yield Watched(name, unit)

    def see(self, name, done):
        if name.partition(",")[0].endswith(self.name) and done >= self.steps:
            self.act()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "where", "steps"),
    [
        ("killed", "out/second", 5),
        ("interrupted", "out/second", 5),
        pytest.param("killed", "out/first", 3, marks=pytest.mark.slow),  # as the second
        ("killed", "lm", 13),  # sequences: at the third unit of four, in the first stage
    ],
)
def test_interrupted_anywhere_it_goes_on_to_the_same_bits(
    whole, chain, tmp_path, how, where, steps
):
    path, out = chain(tmp_path), tmp_path / "out"
    config = load_config(path)
    if how == "killed":
        stopping = Stopping(where, steps, kill)
        assert Child(lambda: run_stages(config, out, progress=stopping)).wait(600) == -9
    else:
        with pytest.raises(Interrupted) as caught:
            run_stages(config, out, progress=Stopping(where, steps, interrupt))
        assert caught.value.told == (
            "; 1 of 3 stages are finished; stage second: interrupted at step 5; a checkpoint of it "
            "is written"
        )
    assert not (out / "third").exists()
    finished = [name for name in NAMES if module.is_finished(out / name)]
    with pytest.raises(InputError, match="--resume"):
        run_stages(config, out)
    before = {name: (out / name / "model.safetensors").stat().st_mtime_ns for name in finished}
    ran = run_stages(config, out, resume=True)
    assert [result.directory.name for result in ran] == [n for n in NAMES if n not in finished]
    for name in NAMES:
        assert weights(out / name) == weights(whole / "out" / name), name
    for name, time in before.items():
        assert (out / name / "model.safetensors").stat().st_mtime_ns == time
    assert run_stages(config, out, resume=True) == []
    record = json.loads((out / "stages.json").read_text())
    for stage in record["stages"]:  # as an older version left it, which had not every key
        del stage["config"]["train"]["schedule"], stage["config"]["corpus"]["on_bad_record"]
    (out / "stages.json").write_text(json.dumps(record))
    assert run_stages(config, out, resume=True) == []


def test_a_changed_configuration_is_not_resumed(whole, chain, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "third")
    config = load_config(chain(whole), ["train.learning_rate=0.5"])
    with pytest.raises(CheckpointError, match=r"first.*train\.learning_rate.*0\.01 there, 0\.5"):
        run_stages(config, tmp_path / "out", resume=True)
    free = load_config(chain(whole), ["train.checkpoint_every=3"])
    ran = run_stages(free, tmp_path / "out", resume=True)  # of what is finished, nothing changed
    assert [result.directory.name for result in ran] == ["third"]


def test_a_stage_that_its_successor_came_from_is_not_made_anew(whole, chain, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    (tmp_path / "out" / "first" / "summary.json").unlink()
    with pytest.raises(CheckpointError, match=r"second was begun from the stage 'first'"):
        run_stages(load_config(chain(whole)), tmp_path / "out", resume=True)


def test_a_stage_may_be_added_to_finished_ones(whole, chain, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    values = yaml.safe_load(chain(whole).read_text())
    values["stages"].append({"name": "fourth", "set": {"student.model": "{third}"}})
    values["stages"][3]["set"] |= {"student.from_scratch": False, "train.steps": 2}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "more.yaml")
    ran = run_stages(config, tmp_path / "out", resume=True)
    assert [result.directory.name for result in ran] == ["fourth"]
    with pytest.raises(CheckpointError, match="a stage 'fourth', which is not in the file"):
        run_stages(load_config(chain(whole)), tmp_path / "out", resume=True)


def test_an_output_directory_in_use_is_refused(chain, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds no run of stages"):
            run_stages(load_config(chain(tmp_path / "home")), out, resume=resume)
    assert not (tmp_path / "home" / "cache").exists()


def test_a_second_process_on_stages_is_refused(chain, tmp_path, command):
    """With the exit code of wrong input, whether it is to resume or not."""
    out = tmp_path / "out"
    given = ("train-student", chain(tmp_path / "home"), "--out", out)
    with locked_folder(out):
        for options in ((), ("--resume",)):
            code, _, told = command(*given, *options)
            assert code == 2
            assert f"another process works on {out}" in told
        assert [p.name for p in out.iterdir()] == [".lock"]
    assert not (tmp_path / "home" / "cache").exists()


# --- errors before anything runs ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"set": {"train.stepz": 1}}, r"stage 'late': unknown key 'train.stepz'.*'steps'"),
        ({"set": {"train.steps": 0}}, r"stage 'late': train.steps: .*greater than 0"),
        ({"set": {"trian.steps": 2}}, r"stage 'late': unknown key 'trian'.*'train'"),
        (
            {"set": {"teachers.4.model": "x"}},
            r"stage 'late': set teachers.4.model: '4' is not an item",
        ),
        ({"set": {"teachers.lmm.model": "x"}}, r"stage 'late'.*did you mean 'lm'"),
        ({"set": {"student.model": "{frist}"}}, r"stage 'late': '{frist}'.*mean '{first}'"),
        ({"set": {"student.model": "{late}"}}, r"stage 'late': '{late}' is no earlier stage"),
        ({"set": {"student.model": {"first": None}}}, r"stage 'late'.*without quotes"),
        ({"set": {"stages.0.name": "x"}}, r"stages.3.set: .*no stages of its own"),
        ({"set": {"train": {"steps": 1}, "train.seed": 1}}, r"stages.3.set: .*the same value"),
        ({"sett": {}}, r"unknown key 'stages.3.sett'; did you mean 'set'"),
        ({"name": "FIRST"}, r"two stages are called 'FIRST'"),
        ({"name": "stages.json"}, r"stage cannot be called 'stages.json'"),
        ({"name": "../up"}, r"stages.3.name"),
        ({"set": {"student": None}}, r"stage 'late': the configuration has no `student` section"),
        ({"set": {"train.objective.distill.0.teachers": ["ml"]}}, r"stage 'late': .*'ml', which"),
        (
            {"set": {"corpus.sequence_length": 32}},
            r"share.*but corpus.sequence_length is 24, then 32",
        ),
        (
            {"set": {"corpus.source": ["python-docs"]}},
            r"'late' share.*but corpus.source is ",
        ),
        ({"set": {"teachers.0.model": "{first}"}}, r"'late' share.*a name stands for one teacher"),
        ({"set": {"teachers.lm.domains": ["x"]}}, r"'late' share.*a name stands for one teacher"),
        ({"set": {"teachers.lm.view": "clean"}}, r"'late' share.*the view of 'lm' is 'masked'"),
        ({"set": {"cache.seed": 1}}, r"'late' share.*the masks of 'lm' is {'seed': 0"),
        ({"set": {"cache.mask.probability": 0.2}}, r"'late' share.*the masks of 'lm'"),
        ({"set": {"train.curriculum": {"teacher": "ml"}}}, r"'late': train.curriculum names.*'ml'"),
        (
            {"set": {"train.objective.methods": [{"method": "replaced_tokens", "teacher": "ml"}]}},
            r"stage 'late': train.objective names the teacher 'ml'",
        ),
        (
            {"set": {"cache.path": "c", "cache.mask": {"policy": "hard", "teacher": "ml"}}},
            r"stage 'late': cache.mask names the teacher 'ml'",
        ),
        (
            {"set": {"cache.sequences_per_shard": 5}},
            r"share.*but cache.sequences_per_shard is 6, then 5",
        ),
        ({"set": {"student.model": "/no/such/model"}}, r"stage 'late': .*no such directory"),
    ],
)
def test_what_is_wrong_in_the_last_stage_is_said_before_the_first_runs(
    chain, tmp_path, stage, message
):
    path = chain(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["stages"].append({"name": "late"} | stage)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=message):
        run_stages(load_config(path), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chain.yaml"]


def test_a_reference_outside_of_a_stage_is_said_before_the_first_runs(chain, tmp_path):
    path = chain(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["teachers"][0]["model"] = "{first}"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"stage 'first': '{first}' stands for a directory only"):
        run_stages(load_config(path), tmp_path / "out")


# --- other commands -------------------------------------------------------------------------------


def test_caching_alone_does_what_it_can_and_says_what_waits(chain, tmp_path):
    done = cache_stages(load_config(chain(tmp_path)))
    assert [one.done.units_done for one in done] == [4, 0, 0]  # 2 shards of 2 replicas
    assert [one.ready.waiting for one in done] == [{}, {"lm": ["first"]}, {"lm": ["second"]}]
    assert "teacher lm waits for stage first" in done[1].as_text()
    assert len(Cache.open(tmp_path / "second-cache")) == 12  # its text and masks are there
    again = cache_stages(load_config(chain(tmp_path)), only=["lm"])
    assert [one.done and one.done.units_present for one in again] == [4, None, None]
    with pytest.raises(InputError, match="no teacher 'ml' in any stage"):
        cache_stages(load_config(chain(tmp_path)), only=["ml"])


@pytest.mark.parametrize("model", ["{first}", None])
def test_masks_of_a_teacher_that_waits_wait_with_it(chain, tmp_path, model):
    """Masks from losses: of a model that an earlier stage makes, or of one that is there."""
    path = chain(tmp_path)
    values = yaml.safe_load(path.read_text())
    model = model or values["teachers"][0]["model"]
    lm, first = values["teachers"][0], values["stages"][0]
    own = {
        "name": "own",
        "model": model,
        "task": "masked_lm",
        "view": "clean",
        "targets": {"kind": "topk", "k": 4},
    }
    changed = {"cache.path": str(tmp_path / "hard"), "teachers": [lm, own]}
    changed["cache.mask"] = {"policy": "hard", "teacher": "own"}
    values["stages"] = [first, {"name": "evolved", "set": changed}]
    path.write_text(yaml.safe_dump(values))
    waits = {"lm": ["first"], "own": ["first"]}
    done = cache_stages(load_config(path))
    assert done[1].ready.waiting == (waits if "{" in model else {})
    assert (done[1].done and done[1].done.units_done) == (None if "{" in model else 4)
    if "{" in model:
        assert "teacher own waits for stage first" in done[1].as_text()
        assert plan_staged_run(load_config(path), probe=False)[1].note == "not known yet"
    else:
        again = cache_stages(load_config(path), only=["lm"])
        assert again[1].done.units_present == 2


def test_a_plan_counts_what_is_known_once(chain, tmp_path):
    path = chain(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["stages"].insert(1, {"name": "longer", "set": {"train.steps": 9}})
    path.write_text(yaml.safe_dump(values))
    planned = plan_staged_run(load_config(path), probe=False)
    assert [one.plan is not None for one in planned] == [True, False, True, True]
    assert "nothing beyond what stage first" in planned[1].note
    assert [[t.name for t in one.plan.teachers] for one in planned if one.plan] == [["lm"], [], []]
    assert "--- stage second ---" in planned[2].as_text()
    assert "waits for stage first" in planned[2].as_text()
    json.dumps([one.as_dict() for one in planned])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chain.yaml"]


def test_what_is_about_one_run_says_what_to_do(chain, whole, tmp_path):
    path = chain(tmp_path)
    config = load_config(path)
    with pytest.raises(InputError, match="has stages, which cannot be swept"):
        plan_sweep(path, ["train.seed=1,2"])
    for call in (
        lambda: cache_teachers(config),
        lambda: train_from_config(config, tmp_path / "out"),
        lambda: plan_run(config),
        lambda: audit_cache(str(whole / "cache"), config, 1),
    ):
        with pytest.raises(InputError, match=r"has stages \(first, second, third\).*run.yaml"):
            call()
    found = audit_cache(
        str(whole / "third-cache"), load_config(whole / "out/third/run.yaml"), 2
    ).values
    assert found["lm"]["top1"] == 1.0


def test_the_stages_of_one_corpus_are_compared(whole):
    """The three caches hold the same text."""
    found = compare_runs([whole / "out"])
    assert [run.name for run in found.runs] == list(NAMES)


def test_an_override_is_for_the_file_and_a_stage_goes_before_it(chain, tmp_path):
    config = load_config(chain(tmp_path), ["train.seed=8", "train.steps=2", "stages.2.name=last"])
    planned = module.plan_stages(config, tmp_path)
    assert [s.config.train.seed for s in planned] == [3, 8, 8]
    assert {s.config.train.steps for s in planned} == {2}
    assert planned[2].directory == tmp_path / "last"


def test_references_stand_inside_strings_too(chain, tmp_path):
    path = chain(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["stages"][1]["set"]["teachers.0.model"] = "{first}/checkpoints/step-00000004"
    path.write_text(yaml.safe_dump(values))
    (_, second, _) = module.plan_stages(load_config(path), tmp_path / "out")
    assert second.config.teachers[0].model == f"{tmp_path}/out/first/checkpoints/step-00000004"
    assert second.written.teachers[0].model == "{first}/checkpoints/step-00000004"
    assert second.uses == ["first"]


def test_the_commands(chain, tmp_path, command):
    """Every command on a file of stages: what it prints, and how it ends."""
    path, out = chain(tmp_path), str(tmp_path / "out")

    code, said, _ = command("plan", path, "--no-probe", "--json")
    assert [one["name"] for one in json.loads(said)["stages"]] == list(NAMES)
    code, said, _ = command("plan", path, "--no-probe")
    assert (code, said.count("--- stage")) == (0, 3)
    code, said, _ = command("cache-teachers", path)
    assert code == 0
    assert "teacher lm waits for stage second" in said
    options = ("train-student", path, "--out", out, "--set", "train.steps=2")
    code, said, _ = command(*options)
    assert code == 0
    assert [f"{out}/{name}: 2 steps in" in said for name in NAMES] == [True] * 3
    code, said, _ = command(*options, "--resume")
    assert (code, said) == (0, f"{out}: every stage was finished\n")
    code, said, err = command(*options)
    assert (code, said) == (2, "")
    assert "is not empty" in err
    code, _, err = command("verify", tmp_path / "cache", "--audit", "1", "--config", path)
    assert code == 2
    assert "run.yaml" in err
    code, _, err = command("train-student", path, "--sweep", "train.seed=1,2")
    assert code == 2
    assert "cannot be swept" in err


def test_a_student_of_a_time_without_lineages(whole, tmp_path):
    """What it says of its own run is there: that is its lineage."""
    from rekindle.train.record.lineage import lineage_of_model

    shutil.copytree(whole / "out" / "second", tmp_path / "old")
    about = json.loads((tmp_path / "old" / "rekindle_student.json").read_text())
    del about["lineage"]
    (tmp_path / "old" / "rekindle_student.json").write_text(json.dumps(about))
    assert lineage_of_model(tmp_path / "old") == lineage_of_model(whole / "out" / "second")[1:]
    (tmp_path / "old" / "rekindle_student.json").write_text("{")
    with pytest.raises(InputError, match=r"rekindle_student\.json is not JSON"):
        lineage_of_model(tmp_path / "old")


def test_weights_load_with_transformers(whole):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(whole / "out" / "third")
    saved = load_file(whole / "out" / "third" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())
