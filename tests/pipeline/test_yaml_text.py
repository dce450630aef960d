"""YAML as people mean it, in run files, cycles and --set; a mistake names the file and the line."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rekindle.data.errors import InputError
from rekindle.pipeline.config import load_config
from rekindle.pipeline.cycle.config import load_cycle
from rekindle.pipeline.sweep.grid import parse_swept_key
from rekindle.pipeline.yaml_text import dump_yaml, parse_yaml
from testlib.command import pipeline

RUN = "corpus: {source: a.txt, tokenizer: t}\ncache: {path: c}\n"
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
ODD = st.sampled_from(["yes", "010", "1:30", "1e-4", "0o7", "1_0", "y", "~", "<<", "=", ".inf", ""])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("5.0e+3", 5000.0),
        *((word, word) for word in ("yes", "no", "on", "off", "y", "1:30", "1_000", "2024-01-31")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("{1: a, true: b}", {"1": "a", "true": "b"}),
        ("{a: &x {k: 1}, b: {<<: *x, l: 2}}", {"a": {"k": 1}, "b": {"k": 1, "l": 2}}),
    ],
)
def test_values_are_what_they_look_like(text, value):
    found = parse_yaml(text, "x")
    assert (found, type(found)) == (value, type(value))


@given(st.recursive(PLAIN | ODD, lambda v: st.lists(v) | st.dictionaries(st.text() | ODD, v)))
def test_what_is_written_is_read_as_the_same_here_and_by_others(values):
    text = dump_yaml(values)
    assert parse_yaml(text, "x") == values
    assert yaml.safe_load(text) == values


def test_what_older_versions_wrote_is_read_as_they_meant_it():
    """PyYAML put in quotes what it took for something else than text."""
    written_by_it = {
        "a": ["yes", "010", "1:30", "2024-01-31", "null", "0x1f"],
        "b": [5e-05, 1e20, 8],
    }
    assert parse_yaml(yaml.safe_dump(written_by_it), "run.yaml") == written_by_it


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cache:\n  path: {{here}}", r"line 2, column 10\): a key must be text"),
        ("a: 1\nb: 2\na: 3", r"line 3, column 1\): the key 'a' is given twice"),
        ("train:\n\tsteps: 3", r"line 2, column 1\): .*spaces, not with a tab"),
        ("a: [1,\n2", r"line 2, column 2\): .*from line 1"),
        ("a: 1\nb: \x07", r"line 2\): the character '\\x07' may not"),
        ("a: &x [1, *x]", "line 1"),
        ("[" * 600, "nested too deeply"),
        ("a: " + "9" * 5000, "line 1"),
    ],
)
def test_a_mistake_is_said_with_its_file_and_line(tmp_path, text, told):
    (tmp_path / "run.yaml").write_text(text)
    for load in (load_config, load_cycle):
        with pytest.raises(InputError, match=rf"run\.yaml is not valid YAML.*{told}") as caught:
            load(tmp_path / "run.yaml")
        assert "unicode string" not in str(caught.value)
    with pytest.raises(InputError, match=rf"^--set a is not valid YAML.*{told}"):
        load_config(written(tmp_path), [f"a={text}"])


def written(folder, text=RUN):
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def test_a_swept_value_that_is_no_yaml_is_told_without_the_parsers_own_names():
    with pytest.raises(InputError, match=r"--sweep a: '\[1' is not a list of YAML values \(line 1"):
        parse_swept_key("a=[1")


@pytest.mark.parametrize("text", ["\ufeff" + RUN, RUN.replace("\n", "\r\n")])
def test_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode())
    assert load_config(path).cache.path == "c"


def test_a_section_with_every_line_commented_out_has_its_defaults(tmp_path):
    text = RUN + "train:\n  # steps: 3\nteachers:\n  # - name: a\nstudent:\n  # model: m\n"
    config = load_config(written(tmp_path, text))
    assert config == load_config(written(tmp_path))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps=yes", r"train\.steps: .*integer.*given: 'yes'"),
        ("train.steps=1:30", r"train\.steps: .*integer.*given: '1:30'"),
        (
            "train.batch_sequences=",
            r"train\.batch_sequences: .*nothing; give a value, or leave the key out",
        ),
        ("train.learning_rate=true", r"learning_rate: must be a number, not true or false"),
        ("train.max_grad_norm=.inf", r"max_grad_norm: .*finite"),
        ("train.weight_decay=.nan", r"weight_decay: .*finite"),
        ("train.objective.hard.weight=.inf", r"hard\.weight: .*finite"),
        ("train.objective.hard.weight=true", r"hard\.weight: must be a number, not true"),
        ("train.seed=9223372036854775808", r"seed: .*and 9223372036854775807 \(2\^63 - 1\)"),
        ("train=3", "train: must be a section: lines of `key: value` below it"),
        ("teachers=3", "teachers: must be a list"),
    ],
)
def test_a_number_is_a_finite_number_and_a_section_a_section(tmp_path, override, told):
    with pytest.raises(InputError, match=told):
        load_config(written(tmp_path), [override])


def test_places_are_filled_in_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    text = (
        "corpus: {source: [~/a.txt, $SCRATCH/*.txt], tokenizer: $SCRATCH/t}\n"
        "cache: {path: '${SCRATCH}/c'}\nstudent: {model: ~/m}\n"
        "stages: [{name: one, set: {student.model: $SCRATCH/m}}]\n"
    )
    config = load_config(written(tmp_path, text))
    assert config.corpus.source == ("/home/me/a.txt", "/scratch/*.txt")
    assert (config.corpus.tokenizer, config.cache.path) == ("/scratch/t", "/scratch/c")
    assert config.student.model == "/home/me/m"
    for key in ("cache.path", "corpus.source", "student.model"):
        with pytest.raises(InputError, match=r"variable NOWHERE of '\$NOWHERE/x' is not set"):
            load_config(written(tmp_path, text), [f"{key}=$NOWHERE/x"])
    with pytest.raises(InputError, match=r"stage 'one': .*variable NOWHERE"):
        load_config(written(tmp_path, text.replace("$SCRATCH/m", "$NOWHERE/m")))


def test_a_place_on_the_command_line_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = pipeline("init", "ki-mlm", "--out=~/new/run.yaml")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/new/run.yaml\n")
    monkeypatch.delenv("NOWHERE", raising=False)
    commands = (
        ("inspect", "$NOWHERE/c"),
        ("compare", "$NOWHERE/a"),
        ("finetune", "$NOWHERE/m", "--train", "a", "--dev", "b", "--out", "c"),
        ("train-student", "$NOWHERE/run.yaml"),
    )
    for command in commands:
        done = pipeline(*command)
        assert done.returncode == 2
        assert "variable NOWHERE" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
