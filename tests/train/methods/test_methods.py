"""A new method is one file: the documentation's example, word for word, in every part of a run.

Nothing of the package is changed by these tests: the file lies in a folder that joins the package.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rekindle.train.methods as home
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.settings import parse_settings
from rekindle.train import method_names as methods
from rekindle.train.config import ObjectiveConfig, StudentConfig, TrainConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.distributed import World
from rekindle.train.evaluate import better_of
from rekindle.train.loop import train_student
from rekindle.train.method import Method, find_method
from rekindle.train.method_names import unknown_method
from rekindle.train.prepare import prepare, prepare_objective
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student
from testlib.command import python

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def example():
    """The name and the text of the file in the documentation."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    code = text.split("`train/methods/certainty.py`", 1)[1].split("```python\n", 1)[1]
    return "certainty", code.split("```", 1)[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose files belong to ``rekindle.train.methods`` during the test."""
    path = tmp_path / "methods"
    path.mkdir()
    monkeypatch.setattr(home, "__path__", [*home.__path__, str(path)])
    before = set(sys.modules)
    yield path
    for name in set(sys.modules) - before:
        if name.startswith("rekindle.train.methods."):
            del sys.modules[name]
            delattr(home, name.rpartition(".")[2])


@pytest.fixture
def certainty(folder):
    name, code = example()
    (folder / f"{name}.py").write_text(code)
    return {"method": name, "teacher": "big"}


def config_of(methods, distill=(), hard=1.0, **values):
    objective = {"hard": {"weight": hard}, "distill": list(distill), "methods": methods}
    quick = {
        "steps": 6,
        "batch_sequences": 4,
        "warmup_steps": 1,
        "checkpoint_every": 3,
        "evaluate_every": 3,
        "held_out": 0.1,
        "evaluate_sequences": 6,
    }
    return parse_settings(TrainConfig, quick | {"objective": objective} | values)


def prepared(world, config):
    cache = world.open()
    chosen = StudentConfig(model=str(world.student))
    return prepare(cache, chosen, config, None, World.alone())


def objective_of(world, config):
    cache = world.open()
    return prepare_objective(cache, StudentConfig(model="m"), config, cache.masked_view().name)


def test_the_example_is_about_as_long_as_it_says(certainty):
    assert len(example()[1].splitlines()) < 55
    assert issubclass(find_method("certainty"), Method)


def test_loss_and_gradient_are_a_plain_references(masked_world, certainty):
    """Through micro-batches and processes."""
    run = prepared(masked_world, config_of([certainty | {"weight": 0.5}], hard=0.0))
    objective, student, cache = run.objective, run.student.eval(), masked_world.open()
    assert objective.plan(0).teachers == ("big",)
    view = cache.masked_view().name
    index = np.arange(5, 16)
    batch = cache.gather(index, ["big"], masked_view=view)
    counts = objective.counts(batch, objective.plan(0))
    found = step_of(student, objective, [batch], counts)
    errors = []
    head = student.method_module("certainty")
    for number in index.tolist():
        target = cache.example(number).targets["big"][0]
        ids = torch.as_tensor(target.input_ids).long()[None]
        states = student.model.base_model(ids).last_hidden_state[0][target.positions]
        best = torch.as_tensor(np.exp(target.log_probs)).amax(dim=1)
        errors.append(((states @ head.weight[0] + head.bias) - best) ** 2)
    student.zero_grad(set_to_none=True)
    expected = 0.5 * torch.cat(errors).mean()
    expected.backward()
    assert found[0] == pytest.approx(float(expected.detach()), rel=1e-4)
    same_gradients(found[1], gradients(student), 1e-4)
    for size in (1, 2, 7):
        parts = split_batch(batch, size)
        same_gradients(step_of(student, objective, parts, counts)[1], found[1])
    apart = [cache.gather(index[rank::3], ["big"], masked_view=view) for rank in range(3)]
    summed = sum(
        objective.counts(part, objective.plan(0)).rows["certainty/error"] for part in apart
    )
    assert summed == counts.rows["certainty/error"]
    same_gradients(step_of(student, objective, apart, counts)[1], found[1])


def step_of(student, objective, parts, counts):
    student.zero_grad(set_to_none=True)
    loss = 0.0
    for part in parts:
        total = objective.loss(student, part, counts, objective.plan(0), CPU).total
        total.backward()
        loss += float(total.detach())
    return loss, gradients(student)


def gradients(student):
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def same_gradients(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name in found:
        assert float((found[name] - expected[name]).abs().max()) <= tolerance * scale, name


def train(world, out, config, resume=False, report=lambda step, values: None):
    chosen = StudentConfig(model=str(world.student))
    return train_student(world.open(), chosen, config, out, resume=resume, report=report)


class Stopped(Exception):
    pass


def test_a_whole_run(masked_world, certainty, tmp_path):
    """Logged, evaluated, kept as the best, saved, loaded; and resumed to the same bits."""
    config = config_of([certainty | {"weight": 3.0}], keep_best="certainty/error")
    result = train(masked_world, tmp_path / "whole", config)
    for r in read_metrics(tmp_path / "whole"):
        if r["kind"] == "train":
            assert r["loss"] == pytest.approx(r["ce"] + 3 * r["certainty/error"], rel=1e-5)
    assert result.evaluation["certainty/error"] > 0
    assert result.evaluation["kl/big"] > 0  # its teacher is measured, too

    def stop(step, values):
        if step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(masked_world, tmp_path / "run", config, report=stop)
    with pytest.raises(CheckpointError, match=r"another configuration.*objective"):
        train(masked_world, tmp_path / "run", config_of([certainty | {"weight": 2.0}]), resume=True)
    train(masked_world, tmp_path / "run", config, resume=True)
    for file in ("model", "heads"):
        ours, theirs = (load_file(tmp_path / n / f"{file}.safetensors") for n in ("run", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    loaded = Student.from_pretrained(tmp_path / "run").method_module("certainty").state_dict()
    assert torch.equal(loaded["weight"], ours["method:certainty.weight"])


def test_a_run_is_also_the_defaults_of_its_methods(masked_world, certainty):
    about = prepared(masked_world, config_of([certainty])).about
    described = about["train"]["objective"]["methods"]
    assert described == [{"method": "certainty", "weight": 1.0, "teacher": "big"}]
    assert list(about["cache"]["teachers"]) == ["big"]


def test_a_weight_of_0_reads_and_measures_nothing(masked_world, certainty, tmp_path):
    falling = {"schedule": "step", "from": 1.0, "to": 0.0, "over": 0.5}
    config = config_of([certainty | {"weight": falling}], evaluate_every=2)
    objective = objective_of(masked_world, config)
    assert [objective.plan(step).teachers for step in range(6)] == [("big",)] * 3 + [()] * 3
    assert [objective.plan(step).weights[-1] for step in range(6)] == [1, 1, 1, 0, 0, 0]
    train(masked_world, tmp_path / "run", config)
    records = read_metrics(tmp_path / "run")
    shown = {(r["kind"], r["step"]) for r in records if "certainty/error" in r}
    assert shown == {("train", 1), ("train", 2), ("train", 3), ("evaluate", 2)}


def test_nothing_at_the_end_is_refused(masked_world, certainty):
    falling = {"schedule": "step", "from": 1.0, "to": 0.0, "over": 0.5}
    with pytest.raises(InputError, match="every weight is 0"):
        objective_of(masked_world, config_of([certainty | {"weight": falling}], hard=0.0))
    objective_of(masked_world, config_of([certainty], hard=0.0))


def test_one_teacher_of_a_method_and_a_term_is_read_once(masked_world, certainty):
    config = config_of([certainty], [{"teachers": ["big"]}])
    assert objective_of(masked_world, config).plan(0).teachers == ("big",)
    for term in (
        {"teachers": ["odd.lm", "big"], "combine": "route"},
        {"teachers": ["big"], "positions": "masked"},
        {"teachers": ["sense"], "divergence": "pseudo_label"},
    ):
        read = certainty | {"teacher": term["teachers"][-1]}
        with pytest.raises(InputError, match=f"'certainty' reads teacher '{read['teacher']}'"):
            objective_of(masked_world, config_of([read], [term]))


@pytest.mark.parametrize(
    ("term", "told"),
    [
        ({"method": "certanty"}, r"methods.0.method: there is no method 'certanty'.*'certainty'"),
        ({"method": "replaced_token"}, "did you mean 'replaced_tokens'"),
        ({"method": "../x"}, "there is no method"),
        ({"method": "certainty"}, "methods.0.*teacher: is missing"),
        ({"teacher": "big"}, "methods.0.method: is missing"),
        (
            {"method": "certainty", "teacher": "big", "weigth": 1},
            "methods.0: unknown key 'weigth'; did you mean 'weight'",
        ),
        ({"method": "certainty", "teacher": "big", "weight": -1}, "methods.0.*weight"),
        ({"method": "certainty", "teacher": "bigg"}, "no teacher 'bigg'"),
    ],
)
def test_what_is_wrong_is_said_with_the_nearest(masked_world, certainty, term, told):
    with pytest.raises(InputError, match=told):
        objective_of(masked_world, config_of([term]))


def test_a_method_stands_in_an_objective_once(masked_world, certainty):
    with pytest.raises(InputError, match=r"methods.1: the method 'certainty' is listed twice"):
        objective_of(masked_world, config_of([certainty, certainty | {"weight": 2.0}]))


def test_a_value_that_is_not_measured_cannot_be_the_best(masked_world, certainty):
    prepared(masked_world, config_of([certainty], keep_best="certainty/error"))
    with pytest.raises(InputError, match=r"this run measures .*certainty/error"):
        prepared(masked_world, config_of([certainty], keep_best="certainty/eror"))


@pytest.mark.parametrize(
    ("name", "upwards"),
    [
        *(("x/accuracy", True), ("x/f1", True), ("x/y/recall", True), ("agreement/x", True)),
        *(("x/loss", False), ("loss", False), ("kl/f1", False), ("mse/accuracy", False)),
    ],
)
def test_which_values_are_better_upwards(name, upwards):
    best = better_of({name: 0.5}, name, 1, None)
    assert better_of({name: 0.6}, name, 2, best)["step"] == (2 if upwards else 1)
    assert better_of({name: 0.4}, name, 2, best)["step"] == (1 if upwards else 2)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("X = 1\n", 0),
        ("from rekindle.train.method import Method\n", 0),
        (
            "from rekindle.train.method import Method\nclass A(Method): ...\nclass B(A): ...\n",
            2,
        ),
    ],
)
def test_a_file_has_one_method(folder, code, count):
    (folder / "odd.py").write_text(code)
    with pytest.raises(
        InputError, match=rf"methods.odd must define exactly one subclass .* has {count}"
    ):
        find_method("odd")


def test_a_method_may_be_installed(monkeypatch):
    """By an entry point of another distribution; what is in the package goes first."""
    from importlib.metadata import EntryPoint

    where = "rekindle.train.methods.replaced_tokens:ReplacedTokens"
    entries = [EntryPoint("theirs", where, methods.GROUP), EntryPoint("n", "json:dumps", "x")]
    monkeypatch.setattr(methods, "entry_points", lambda group: entries[: group == methods.GROUP])
    assert unknown_method("theirs") is None
    assert find_method("theirs").__name__ == "ReplacedTokens"
    assert "'theirs'" in unknown_method("their")
    config = parse_settings(ObjectiveConfig, {"methods": [{"method": "theirs", "k": 3}]})
    assert config.methods[0].model_extra == {"k": 3}
    entries[0] = EntryPoint("theirs", "json:dumps", methods.GROUP)
    with pytest.raises(InputError, match=r"json:dumps.*has 0"):
        find_method("theirs")


def test_a_method_may_name_the_whole_student(masked_world, certainty, folder):
    """As methods did before the network had a file of its own."""
    path = folder / "certainty.py"
    code = path.read_text().replace("(cls, settings, student)", "(cls, settings, student: Student)")
    code = code.replace("class Cert", "from rekindle.train.student import Student\n\nclass Cert", 1)
    path.write_text(code)
    run = prepared(masked_world, config_of([certainty]))
    assert isinstance(run.student, Student)
    assert run.student.method_module("certainty").weight.requires_grad


def test_a_method_where_methods_were_once_is_told_the_new_place(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "__file__", str(tmp_path / "method_names.py"))
    for name in ("mine", "names"):
        (tmp_path / f"method_{name}.py").touch()
    with pytest.raises(InputError, match=r"method_mine\.py.*move it to train/methods/mine\.py"):
        parse_settings(ObjectiveConfig, {"methods": [{"method": "mine"}]})
    assert "there is no method 'names' (known" in unknown_method("names")


def test_a_run_file_with_a_method_is_read_without_torch():
    program = (
        "import sys\n"
        "from rekindle.train.config import ObjectiveConfig\n"
        "c = ObjectiveConfig(methods=[{'method': 'replaced_tokens', 'weight': 3}])\n"
        "assert ObjectiveConfig.model_validate(c.model_dump(mode='json')) == c\n"
        "print([m for m in sys.modules if m in ('torch', 'transformers') or '.methods.' in m])"
    )
    assert python(program) == "[]"


def test_the_files_of_the_package_are_its_methods():
    files = {path.stem for path in (ROOT / "train" / "methods").glob("[!_]*.py")}
    assert methods.own_methods() == files
    for name in methods.own_methods():
        kind = find_method(name)
        assert all(field.description for field in kind.Settings.model_fields.values())
        assert re.fullmatch(r"[a-z0-9_]+", name)
