"""Which students a sweep means: values, combinations, names, and what is refused at once."""

import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.pipeline.config import load_config
from rekindle.pipeline.sweep.grid import (
    parse_swept_key,
    plan_sweep,
    shortest_tails,
    unique_names,
)

TEMPERATURE = "train.objective.distill.0.temperature"


@pytest.fixture
def run_file(tmp_path):
    values = {
        "corpus": {"source": ["x.txt"], "tokenizer": "t"},
        "cache": {"path": "c"},
        "teachers": [{"name": "lm", "model": "m", "task": "masked_lm"}],
        "student": {"model": "m"},
        "train": {"objective": {"distill": [{"teachers": ["lm"]}, {"teachers": ["lm"]}]}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


# --- one option -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2,4", ("1", "2", "4")),
        ("a.b = 1 , 2 ", ("1", "2")),
        ("a.b=1e-4,5.0e-4", ("1e-4", "5.0e-4")),
        ("a.b=[1,2],[3]", ("[1,2]", "[3]")),
        ("a.b={x: 1, y: [2]},0.5", ("{x: 1, y: [2]}", "0.5")),
        ("a.b='x,y',\"z\",null", ("'x,y'", '"z"', "null")),
        ("a.b=path/to=this", ("path/to=this",)),
    ],
)
def test_the_values_are_items_of_a_yaml_list(text, values):
    assert parse_swept_key(text) == ("a.b", values)


@given(
    st.lists(
        st.integers()
        | st.floats(allow_nan=False)
        | st.text(string.printable)
        | st.booleans()
        | st.none()
        | st.lists(st.integers() | st.text("ab, []{}:#'\""), max_size=3)
        | st.dictionaries(st.text("ab:, ", min_size=1), st.integers(), max_size=2),
        min_size=1,
        max_size=4,
    )
)
def test_every_value_is_read_as_set_reads_it(values):
    """A value that is cut out of the list means what it means inside of it."""
    inside = yaml.safe_dump(values, default_flow_style=True, width=10**6, allow_unicode=True)
    _, texts = parse_swept_key("a=" + inside.strip().removeprefix("[").removesuffix("]"))
    assert [yaml.safe_load(text) for text in texts] == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.seed", ("key.path=value,value", "'train.seed'")),
        ("=1,2", ("key.path=value,value",)),
        ("train.seed=", ("train.seed", "no value")),
        ("train.seed=1,[2", ("train.seed", "'1,[2'")),
        ("train.seed=1,,2", ("train.seed", "not a list of YAML values")),
        ("train.seed=1]", ("train.seed", "not a list of YAML values")),
        ("train.seed=1] #", ("train.seed", "not a list of YAML values")),
    ],
)
def test_what_is_no_sweep_is_named(run_file, text, words):
    with pytest.raises(InputError) as caught:
        plan_sweep(run_file, [text])
    for word in words:
        assert word in str(caught.value)


# --- all combinations -----------------------------------------------------------------------------


def test_every_combination_is_what_set_makes_of_it(run_file):
    runs = plan_sweep(run_file, [f"{TEMPERATURE}=1,2,4", "train.seed=0,7"], ["train.steps=5"])
    expected = [
        (f"temperature={t},seed={s}", {TEMPERATURE: t, "train.seed": s})
        for t in "124"
        for s in "07"
    ]
    assert [(run.name, run.values) for run in runs] == expected
    for run in runs:
        settings = [f"{key}={value}" for key, value in run.values.items()]
        assert run.config == load_config(run_file, ["train.steps=5", *settings])
    assert len({run.config.model_dump_json() for run in runs}) == 6


def test_an_item_of_a_list_may_be_named_and_a_list_be_a_value(run_file):
    runs = plan_sweep(
        run_file,
        ["train.allow_missing=[lm],[]", "train.objective.distill.1.k=4,null"],
    )
    assert [run.name for run in runs] == [
        "allow_missing=lm,k=4",
        "allow_missing=lm,k=null",
        "allow_missing=empty,k=4",
        "allow_missing=empty,k=null",
    ]
    assert [run.config.train.allow_missing for run in runs] == [("lm",), ("lm",), (), ()]
    assert [run.config.train.objective.distill[1].k for run in runs] == [4, None, 4, None]


def test_names_have_the_parts_that_tell_the_keys_apart(run_file):
    second = TEMPERATURE.replace(".0.", ".1.")
    (run,) = plan_sweep(run_file, [f"{TEMPERATURE}=1", f"{second}=2", "train.seed=3"])
    assert run.name == "0.temperature=1,1.temperature=2,seed=3"


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (["corpus.sequence_length=8,16"], ("corpus.sequence_length", "one cache", "corpus.*")),
        (["cache.path=a,b"], ("cache.path", "one cache", "--set")),
        (["teachers.lm.model=a,b"], ("teachers.lm.model", "one cache")),
        (["train.seed=1", "train.seed=2"], ("train.seed", "given twice")),
        (["train.seed=1,1"], ("seed=1 and seed=1-2", "the same configuration")),
        (["train.learning_rate=1,1.0"], ("learning_rate=1 and learning_rate=1.0",)),
        (["train.steps=5,0"], ("at train.steps=0:", "greater than 0")),
        (["train.seed=1,2", "train.schedule=linear,no"], ("at train.seed=1, train.schedule=no:",)),
        (["train.sed=1"], ("train.sed", "'seed'")),
        (["training.seed=1"], ("training", "'train'")),
        ([f"{TEMPERATURE.replace('0', '5')}=1"], ("'5' is not an item",)),
        (["student=null"], ("no `student` section",)),
    ],
)
def test_a_wrong_combination_is_refused_by_name(run_file, sweep, words):
    with pytest.raises(InputError) as caught:
        plan_sweep(run_file, sweep)
    for word in words:
        assert word in str(caught.value)


# --- names ----------------------------------------------------------------------------------------

part = st.text("ab01", min_size=1, max_size=2)


@given(st.lists(st.lists(part, min_size=1, max_size=4).map(tuple), unique=True, max_size=6))
def test_tails_are_ends_that_tell_paths_apart(paths):
    tails = shortest_tails(paths)
    assert len(set(tails)) == len(paths)
    for tail, path in zip(tails, paths, strict=True):
        assert f".{'.'.join(path)}".endswith(f".{tail}")


def test_tails_are_short_but_no_mere_number():
    assert shortest_tails([("a", "b", "k"), ("a", "c", "k"), ("d",)]) == ["b.k", "c.k", "d"]
    assert shortest_tails([("a", "teachers", "0"), ("x", "y")]) == ["teachers.0", "y"]
    paths = [("objective", "hard", "weight"), ("objective", "distill", "0", "weight"), ("seed",)]
    assert shortest_tails(paths, least=2) == ["hard.weight", "distill.0.weight", "seed"]
    assert shortest_tails([("", "runs", "a"), ("", "old", "a")], "/") == ["runs/a", "old/a"]


@given(st.lists(st.tuples(st.text(max_size=150), st.text(max_size=150)), max_size=8))
def test_names_are_safe_and_distinct_on_any_file_system(pairs):
    names = unique_names([[pair] for pair in pairs])
    assert len({name.casefold() for name in names}) == len(pairs)
    allowed = set(string.ascii_letters + string.digits + ".+_-=,")
    for name in names:
        assert set(name) <= allowed
        assert 0 < len(name) < 140
        assert name.strip(".") != ""
        assert not name.endswith(".")


def test_names_are_readable():
    given_pairs = [
        [("temperature", "2"), ("seed", "-1")],
        [("model", "path/to/BERT")],
        [("model", "path/to/bert")],
        [("weight", "{schedule: linear, from: 1.0}")],
    ]
    assert unique_names(given_pairs) == [
        "temperature=2,seed=-1",
        "model=path-to-BERT",
        "model=path-to-bert-2",
        "weight=schedule-linear-from-1.0",
    ]
