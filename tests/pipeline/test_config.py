"""The run file: strict keys, overrides that reach everywhere, and the design's own example."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.config import RunConfig, dump_config, load_config
from rekindle.pipeline.overrides import set_value
from testlib.command import python

MINIMAL = {
    "corpus": {"source": "text.jsonl", "tokenizer": "tok"},
    "cache": {"path": "runs/cache"},
}

# DESIGN.md §3, word for word, but for its comments.
EXAMPLE = """
corpus:
  source: [wiki.jsonl]
  text_field: text
  domain_field: null
  tokenizer: path-or-id
  sequence_length: 128
  packing: document
  limit_sequences: null
cache:
  path: runs/cache
  sequences_per_shard: null
  replicas: 4
  mask: {policy: random, unit: token, probability: 0.15, mask_token: 0.8, random_token: 0.1}
  seed: 0
teachers:
  - name: big-lm
    model: path-or-id
    task: masked_lm
    targets: {kind: topk, k: 64, temperatures: [1.0, 2.0, 4.0]}
    domains: null
    monte_carlo: {passes: 0}
    pairs: adjacent
    precision: auto
    batch_tokens: auto
student:
  model: path-or-id
  from_scratch: false
  task: masked_lm
  grow: null
train:
  steps: 1000
  batch_sequences: 64
  learning_rate: 5.0e-4
  warmup_steps: 100
  schedule: linear
  precision: auto
  seed: 0
  checkpoint_every: 5 min
  evaluate_every: 200
  objective:
    hard: {weight: 1.0}
    distill:
      - teachers: [big-lm]
        weight: {schedule: linear, from: 1.0, to: 0.0, over: 0.6}
        temperature: 2.0
        divergence: forward_kl
        tail: bucket
        k: null
        combine: separate
        view: clean
"""
LATER_KEYS: dict[str, None] = {}  # keys of the example that this version does not have yet


@pytest.fixture
def run_file(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE)
    return path


def config_with(**sections: Any) -> RunConfig:
    return parse_settings(RunConfig, MINIMAL | sections)


# --- the example of the design --------------------------------------------------------------------


def test_the_example_of_the_design_is_read(run_file):
    config = load_config(run_file)
    assert config.corpus.source == ("wiki.jsonl",)
    assert config.cache.mask.policy == "random"
    assert config.cache.replicas == 4
    (teacher,) = config.teachers
    assert (teacher.name, teacher.task, teacher.targets.k) == ("big-lm", "masked_lm", 64)
    assert teacher.targets.temperatures == (1.0, 2.0, 4.0)
    assert config.student.task == "masked_lm"
    assert config.train.learning_rate == 5e-4
    (term,) = config.train.objective.distill
    assert (term.weight.start, term.weight.end, term.weight.over) == (1.0, 0.0, 0.6)
    assert term.divergence == "forward_kl"
    assert config.needs_masks


def test_the_values_of_the_example_are_the_defaults(run_file):
    """Nothing in it must be said, except names, places and the distillation."""
    config = load_config(run_file)
    short = config_with(
        corpus={"source": "wiki.jsonl", "tokenizer": "path-or-id"},
        teachers=[{"name": "big-lm", "model": "path-or-id", "task": "masked_lm"}],
        student={"model": "path-or-id"},
    )
    assert config.corpus == short.corpus
    assert config.cache == short.cache
    assert config.student == short.student
    assert config.teachers[0].targets.k == short.teachers[0].targets.k
    assert short.teachers[0].targets.vocabulary_kind == "threshold"  # topk serves several at once
    without = {"objective"}
    assert config.train.model_dump(exclude=without) == short.train.model_dump(exclude=without)


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "corpus.packing": ["document", "contiguous"],
        "cache.mask.policy": ["random", "cover"],
        "cache.mask.unit": ["token", "word", "span"],
        "teachers.big-lm.targets.kind": ["topk", "dense"],
        "cache.mask": ["{policy: hard, teacher: big-lm, loss_above: 0.1, limit: null}"],
        "teachers.big-lm.view": ["masked", "clean"],
        "teachers.big-lm.precision": ["auto", "fp32", "bf16", "fp16"],
        "student.task": ["masked_lm", "causal_lm", "replaced_token_detection"],
        "student.grow": ["null", "{layers: 12, hidden_size: 768, heads: 12}", "{copy: last}"],
        "student.grow.preserve": ["approximate", "exact"],
        "student.domain_prompts": ["true", "false"],
        "train.objective.distill.0.divergence": [
            *("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "mse"),
        ],
        "train.objective.distill.0.tail": ["bucket", "renormalise", "none"],
        "train.objective.distill.0.combine": ["separate", "mixture", "uncertainty", "route"],
        "train.objective.hard.weight": ["0.5", "{schedule: linear, from: 1.0, to: 0.0, over: 0.5}"],
    }.items(),
)
def test_what_the_design_offers_beside_the_example(run_file, key, values):
    for value in values:
        load_config(run_file, [f"{key}={value}"])


def test_what_is_for_a_later_version_is_refused_by_name(tmp_path, run_file):
    """A value that is not built yet must not pass in silence. Shrinks as the design is built."""
    for key in LATER_KEYS:
        with pytest.raises(InputError, match=f"unknown key '{re.escape(key)}'"):
            load_config(run_file, [f"{key}=null"])


@pytest.mark.parametrize("kind", ["topk", "threshold", "random", "dense", "hidden"])
def test_every_kind_of_target_of_the_design(run_file, kind):
    one = kind in ("threshold", "random")
    values = [
        f"teachers.0.targets={{kind: {kind}, k: 9, temperatures: {[2.0] if one else [2.0, 4.0]}}}"
    ]
    targets = load_config(run_file, values).teachers[0].targets
    assert (targets.kind, targets.k) == (kind, 9)
    assert targets.temperatures == ((2.0,) if one else (1.0, 2.0, 4.0))
    assert load_config(run_file, [f"teachers.0.targets={{kind: {kind}}}"]).teachers[0].targets


def test_every_task_of_the_design(run_file):
    for task in (
        "masked_lm",
        "causal_lm",
        "sequence_classification",
        "regression",
        "token_classification",
    ):
        kind = "topk" if task.endswith("lm") else "dense"
        overrides = [f"teachers.0.task={task}", f"teachers.0.targets.kind={kind}"]
        assert load_config(run_file, overrides).teachers[0].task == task


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["train.objective.distill.0.weight=0.25"]])
def test_a_dumped_configuration_reads_back_as_itself(tmp_path, run_file, overrides):
    config = load_config(run_file, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert dump_config(load_config(again)) == dump_config(config)
    assert "from: 1.0" in dump_config(config) or overrides


def test_what_yaml_could_misread_survives_the_dump(tmp_path):
    odd = ["no", "1e3", "null", "ünïcode", "a: b", "#x", "'", " lead"]
    teacher = {"name": "1e3", "model": "null", "task": "causal_lm", "domains": odd}
    config = config_with(teachers=[teacher])
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config
    assert load_config(tmp_path / "run.yaml").teachers[0].domains == tuple(odd)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: b: c", "not valid YAML.*line 1"),
        (b"just words", "must be a mapping"),
        (b"cache: {path: a, seed: 1, path: b}", "'path' is given twice"),
        (b"teachers:\n- {name: a, name: b}", "line 2.*'name' is given twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, told):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"run\.yaml.*{told}"):
        load_config(path)


def test_anchors_and_merges_are_yaml_as_ever(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(MINIMAL)
        + "teachers:\n"
        + "- &first {name: a, model: m, task: causal_lm, targets: {k: 3}}\n"
        + "- {<<: *first, name: b}\n"
    )
    assert [(t.name, t.targets.k) for t in load_config(path).teachers] == [("a", 3), ("b", 3)]


# --- keys and values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("corpora.x", "corpus"),
        ("corpus.tokeniser", "tokenizer"),
        ("cache.mask.prob", "probability"),
        ("teachers.big-lm.temperature", None),
        ("teachers.0.targets.temperature", "temperatures"),
        ("student.from_skratch", "from_scratch"),
        ("train.learning_rat", "learning_rate"),
        ("train.objective.distil", "distill"),
        ("train.objective.distill.0.divergance", "divergence"),
        ("train.objective.distill.0.weight.form", "from"),
    ],
)
def test_an_unknown_key_names_the_nearest(run_file, key, nearest):
    with pytest.raises(InputError) as caught:
        load_config(run_file, [f"{key}=1"])
    message = str(caught.value)
    assert message.startswith(str(run_file))
    assert f"unknown key '{key.removesuffix('.x').replace('big-lm', '0')}'" in message
    if nearest:
        assert f"did you mean '{nearest}" in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("corpus.sequence_length=7", "corpus.sequence_length.*8"),
        ("corpus.sequence_length=70000", "corpus.sequence_length.*65536"),
        ("corpus.sequence_length=long", r"corpus.sequence_length.*\(given: 'long'\)"),
        ("corpus.limit_sequences=0", "corpus.limit_sequences"),
        ("cache.replicas=0", "cache.replicas"),
        ("cache.replicas=1000", "cache.replicas"),
        ("cache.sequences_per_shard=0", "cache.sequences_per_shard"),
        ("cache.mask.probability=1.5", "cache.mask.probability"),
        ("cache.mask={mask_token: 0.8, random_token: 0.3}", "must not exceed 1"),
        ("teachers.0.name=a/b", "teachers.0.name"),
        ("teachers.0.name=..", "teachers.0.name"),
        ("teachers.0.task=translation", "teachers.0.task.*'translation'"),
        ("teachers.0.targets.k=0", "targets.k"),
        ("teachers.0.targets.temperatures=[1, 0]", "temperatures.1: .*greater than 0"),
        ("teachers.0.targets.temperatures=[.nan]", "temperatures.0: .*finite"),
        ("teachers.0.targets.temperatures=[.inf]", "temperatures.0: .*finite"),
        ("teachers.0.batch_tokens=0", "batch_tokens: Input should be 'auto', or greater than 0"),
        ("teachers.0.batch_tokens=many", "batch_tokens"),
        ("teachers.0.monte_carlo.passes=2", "sequence_classification"),
        ("teachers.0.monte_carlo.passes=-1", "passes"),
        ("teachers.0.pairs=neighbours", "pairs"),
        ("teachers.0.domains=[]", "domains.*at least 1"),
        ("teachers.0.task=regression", "topk targets are for masked_lm and causal_lm"),
        ("teachers=[{name: a, model: m, task: causal_lm}, {name: a, model: n, task: causal_lm}]",
         "two teachers are called 'a'"),
        ("train.steps=0", "train.steps"),
        ("train.learning_rate=-1", "learning_rate"),
        ("train.objective.hard.weight=-1", "weight"),
        ("corpus=null", "corpus"),
        ("cache.path=null", "cache.path"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(run_file, override, told):
    with pytest.raises(InputError, match=told):
        load_config(run_file, [override])


def test_all_problems_are_told_at_once(run_file):
    overrides = ["train.steps=0", "cache.replicas=0", "corpus.packin=x"]
    with pytest.raises(InputError, match="steps") as caught:
        load_config(run_file, overrides)
    assert "replicas" in str(caught.value)
    assert "packin" in str(caught.value)


def test_one_is_always_among_the_temperatures():
    teacher = {"name": "a", "model": "m", "task": "causal_lm"}
    for given, stored in [([], (1.0,)), ([4, 2, 2], (1.0, 2.0, 4.0)), ([0.5], (0.5, 1.0))]:
        config = config_with(teachers=[teacher | {"targets": {"temperatures": given}}])
        assert config.teachers[0].targets.temperatures == stored


def test_what_is_kept_unless_said_otherwise():
    """Threshold samples, but where other temperatures are asked for: one sample has one."""
    teacher = {"name": "a", "model": "m", "task": "causal_lm"}
    expected = {
        "{}": ("threshold", (1.0,)),
        "{k: 8}": ("threshold", (1.0,)),
        "{temperatures: [1]}": ("threshold", (1.0,)),
        "{codec: compact}": ("threshold", (1.0,)),
        "{temperatures: [2]}": ("topk", (1.0, 2.0)),
        "{temperatures: [1, 4]}": ("topk", (1.0, 4.0)),
        "{kind: topk}": ("topk", (1.0, 2.0, 4.0)),
        "{kind: topk, temperatures: [1]}": ("topk", (1.0,)),
        "{kind: threshold, temperatures: [2]}": ("threshold", (2.0,)),
    }
    for given, found in expected.items():
        config = config_with(teachers=[teacher | {"targets": yaml.safe_load(given)}])
        again = parse_settings(RunConfig, yaml.safe_load(dump_config(config)))
        for one in (config, again):
            targets = one.teachers[0].targets
            assert (targets.vocabulary_kind, targets.temperatures) == found, given


def test_masks_are_made_for_whom_they_are_needed():
    teacher = {"name": "a", "model": "m", "task": "causal_lm"}
    assert not config_with(teachers=[teacher]).needs_masks
    assert config_with(teachers=[teacher | {"task": "masked_lm"}]).needs_masks
    assert config_with(student={"model": "m"}).needs_masks
    assert config_with(student={"model": "m", "task": "replaced_token_detection"}).needs_masks
    assert not config_with(student={"model": "m", "task": "causal_lm"}).needs_masks


# --- overrides ------------------------------------------------------------------------------------

VALUES = {
    "plain": 1,
    "nested": {"key": {"deep": 2}},
    "empty": None,
    "list": [10, 11, 12],
    "items": [{"value": 0}, {"name": "named", "value": 1}, {"name": "other", "value": 2}, 7],
}


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("plain=2", ["plain"], 2),
        ("nested.key.deep=3", ["nested", "key", "deep"], 3),
        ("nested.key.new=3", ["nested", "key", "new"], 3),
        ("new.key.deep=3", ["new", "key", "deep"], 3),
        ("empty.key=3", ["empty", "key"], 3),
        ("list.0=x", ["list", 0], "x"),
        ("list.2=x", ["list", 2], "x"),
        ("items.0.value=5", ["items", 0, "value"], 5),
        ("items.1.value=5", ["items", 1, "value"], 5),
        ("items.named.value=5", ["items", 1, "value"], 5),
        ("items.other.value=5", ["items", 2, "value"], 5),
        ("items.named={name: fresh}", ["items", 1], {"name": "fresh"}),
        ("plain=[1, 2]", ["plain"], [1, 2]),
        ("plain={a: b}", ["plain"], {"a": "b"}),
        ("plain=null", ["plain"], None),
        ("plain=", ["plain"], None),
        ("plain=a=b", ["plain"], "a=b"),
        ("plain='1'", ["plain"], "1"),
        (" plain =true", ["plain"], True),
    ],
)
def test_an_override_changes_one_value_and_no_other(override, path, expected):
    import copy

    values = copy.deepcopy(VALUES)
    set_value(values, override)
    here: Any = values
    for part in path:
        here = here[part]
    assert here == expected
    top = path[0]
    assert {k: v for k, v in values.items() if k != top} == {
        k: v for k, v in VALUES.items() if k != top
    }
    if top == "items":
        others = [i for i in range(4) if i != path[1]]
        assert [values["items"][i] for i in others] == [VALUES["items"][i] for i in others]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("plain", "key.path=value, got 'plain'"),
        ("=1", "key.path=value"),
        ("", "key.path=value"),
        ("plain.x=1", "'x' is below a plain value"),
        ("plain.x.y=1", "'x' is below a plain value"),
        ("list.3=1", "'3' is not an item of a list of 3"),
        ("list.-1=1", "'-1' is not an item"),
        ("list.x=1", "'x' is not an item"),
        ("list.²=1", "'²' is not an item"),
        ("items.namd.value=1", "'namd' is not an item of a list of 4; did you mean 'named'"),
        ("items.3.value=1", "'value' is below a plain value"),
        ("plain=[1", "not valid YAML"),
        ("plain={a: 1, a: 2}", "'a' is given twice"),
    ],
)
def test_overrides_that_lead_nowhere(override, told):
    import copy

    with pytest.raises(InputError, match=re.escape(told)):
        set_value(copy.deepcopy(VALUES), override)


def test_overrides_of_a_file(run_file):
    config = load_config(
        run_file,
        [
            "cache.path=elsewhere",
            "teachers.big-lm.targets.k=8",
            "teachers.0.targets.temperatures=[3]",
            "train.objective.distill.0.weight=0.5",
            "student=null",
        ],
    )
    assert config.cache.path == "elsewhere"
    assert config.teachers[0].targets.k == 8
    assert config.teachers[0].targets.temperatures == (1.0, 3.0)
    assert config.train.objective.distill[0].weight == 0.5
    assert config.student is None


def test_reading_a_configuration_imports_no_torch():
    program = (
        "import sys, rekindle.pipeline.config; "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert python(program) == "[]"
