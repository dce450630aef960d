"""The norm of each term's gradient: by autograd, however a step is split, at no price."""

import math

import pytest

from rekindle.train.measures import GRADIENT, GRADIENT_RATIO
from rekindle.train.objective.selection import names_of
from rekindle.train.objective.term_gradients import describe_gradients, with_norms
from testlib.loop import run, train_config
from testlib.objective.cases import OBJECTIVES, term
from testlib.objective.setting import Setting, same_step
from testlib.students import metrics, same_weights


def measured(world, objective, **options):
    setting = Setting(world, objective, **options)
    setting.objective.measure_every = 1
    return setting


def alone(setting):
    """Each loss's name, an objective of nothing else, and whether the output matrix reads it."""
    config = setting.objective.config.model_dump(mode="json", by_alias=True)
    yield "ce", {"hard": config["hard"]}, True
    for values, given in zip(config["distill"], setting.objective.config.distill, strict=True):
        parts = [given.teachers] if given.combine != "separate" else [(t,) for t in given.teachers]
        for teachers in parts:
            objective = {"hard": {"weight": 0}, "distill": [values | {"teachers": teachers}]}
            words = setting.objective.teachers[teachers[0]].is_vocabulary
            yield names_of(given)[teachers[0]], objective, words


def norm_by_autograd(world, student, objective, words):
    """Through the whole graph: of what `_run` gave, at the rows of the output matrix or in all."""
    setting, seen = Setting(world, objective), []
    setting.student = student
    run_body = setting.student._run

    def watched(inputs, select):
        hidden, states = run_body(inputs, select)
        kept = [hidden if words else states]
        for one in kept:
            one.retain_grad()
        seen.extend(kept)
        return hidden, states

    setting.student._run = watched
    try:
        setting.run()
    finally:
        del student._run
    return math.sqrt(sum(float(s.grad.square().sum()) for s in seen if s.grad is not None))


@pytest.mark.parametrize(
    ("world", "objective"),
    [
        ("masked_world", OBJECTIVES["everything"]),
        (
            "causal_world",
            {
                "hard": {"weight": 0.7},
                "distill": [term("odd", weight=0.2), term("lm", temperature=2.0), term("sense")],
            },
        ),
    ],
)
def test_the_pull_of_each_term_is_its_gradient_alone(request, world, objective):
    world = request.getfixturevalue(world)
    setting = measured(world, objective)
    _, terms, _ = setting.run()
    found = {
        n.removeprefix(GRADIENT): math.sqrt(v) for n, v in terms.items() if n.startswith(GRADIENT)
    }
    student = setting.student
    expected = {n: norm_by_autograd(world, student, *one) for n, *one in alone(setting)}
    assert len(expected) == len(set(expected.values())) > 3
    assert all(norm > 1e-4 for norm in expected.values())
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("divide", [lambda s: s.run(micro=4), lambda s: s.run_apart(3)])
def test_how_a_step_is_split_changes_no_pull(masked_world, divide):
    """Of all rows of the step, whoever has them."""
    setting = measured(masked_world, OBJECTIVES["everything"], batch=range(5, 16))
    whole = setting.run()
    assert f"{GRADIENT}ce" in whole[1]
    same_step(divide(setting), whole)


def test_a_weight_is_in_the_pull_that_it_has(masked_world):
    def gradients(weight):
        objective = {"distill": [term("big", weight=weight)]}
        return measured(masked_world, objective, batch=[4, 9]).run()[1]

    one, tenfold = gradients(0.3), gradients(3.0)
    name = f"{GRADIENT}kd/big"
    assert tenfold[name] == pytest.approx(100 * one[name], rel=1e-4)  # squares
    assert tenfold[f"{GRADIENT}ce"] == pytest.approx(one[f"{GRADIENT}ce"], rel=1e-5)


def test_what_is_measured_changes_nothing(masked_world, tmp_path):
    """With dropout and micro-batches: every weight is the same to the bit, and all other values."""
    terms = [{"teachers": ["big"], "weight": 0.5}, {"teachers": ["sense"]}]
    settings = {"steps": 4, "micro_batch_sequences": 2}

    def trained(every):
        chosen = train_config(terms, log_gradients_every=every, **settings)
        return run(masked_world, tmp_path / str(every), chosen)

    often, never = trained(2), trained(None)
    assert same_weights(often.directory, never.directory)
    seen = metrics(often.directory)
    gradients = [
        {k: v for k, v in r.items() if k.startswith((GRADIENT, GRADIENT_RATIO))} for r in seen
    ]
    others = [
        {k: v for k, v in r.items() if not k.startswith((GRADIENT, GRADIENT_RATIO))} for r in seen
    ]
    assert others == metrics(never.directory)
    names = {f"{GRADIENT}ce", f"{GRADIENT}kd/big", f"{GRADIENT}kd/sense"}
    names |= {f"{GRADIENT_RATIO}kd/big", f"{GRADIENT_RATIO}kd/sense"}
    for record, values in zip(seen, gradients, strict=True):
        due = record["kind"] == "train" and record["step"] in (1, 3)
        assert values.keys() == (names if due else set())
        if due:
            ratio = values[f"{GRADIENT}kd/big"] / values[f"{GRADIENT}ce"]
            assert values[f"{GRADIENT_RATIO}kd/big"] == pytest.approx(ratio, rel=1e-6)


def test_what_is_said_of_gradients():
    values = {
        "loss": 3.0,
        "kd/a": 1.0,
        f"{GRADIENT}ce": 4.0,
        f"{GRADIENT}kd/a": 1.0,
        f"{GRADIENT}x": 0.0,
    }
    assert describe_gradients(with_norms(values)) == "gradients over ce's: kd/a 0.5"
    del values[f"{GRADIENT}ce"]
    assert with_norms(values) == {"loss": 3.0, "kd/a": 1.0, f"{GRADIENT}kd/a": 1.0}
    assert describe_gradients(with_norms(values)) == "gradients: kd/a 1"
    assert describe_gradients({"loss": 3.0, "kd/a": 1.0}) == ""
