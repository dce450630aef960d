"""The configuration of a cycle: what it says, and what it refuses before anything runs."""

import json
from pathlib import Path

import pytest
import typer
import yaml

from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.cli import app
from rekindle.pipeline.config import dump_config, load_config
from rekindle.pipeline.cycle.config import (
    ARMS,
    CycleConfig,
    load_cycle,
    point_name,
)
from rekindle.pipeline.cycle.page import commands_of
from rekindle.pipeline.overrides import set_value

VALUES = {
    "corpus": {"source": ["text.txt"], "tokenizer": "model"},
    "student": {"model": "model"},
    "tasks": [
        {"name": "a", "train": "a.jsonl", "test": "a-test.jsonl", "metric": "matthews"},
        {"name": "b", "train": "b.jsonl", "test": "b-test.jsonl", "finetune": {"epochs": 5}},
    ],
}


def config_of(*overrides):
    values = json.loads(json.dumps(VALUES))
    for override in overrides:
        set_value(values, override)
    return parse_settings(CycleConfig, values)


def test_without_more_everything_is_compared_over_five_seeds():
    config = config_of()
    assert config.arms == tuple(ARMS)
    assert config.seeds == 5
    assert config.search_points() == [{}]


def test_the_arms_are_in_one_order_and_experts_among_them():
    assert config_of("arms=[mixture,longer]").arms == ("expert", "longer", "mixture")


def test_what_is_told_to_be_done_by_hand_has_only_options_that_there_are(tmp_path):
    known = typer.main.get_command(app).commands
    for _, line in commands_of(tmp_path, config_of(), {}):
        _, name, *arguments = line.split()
        known[name].make_context(name, arguments)


def test_of_one_task_both_stands_in_the_place_of_the_mixture():
    one = parse_settings(CycleConfig, VALUES | {"tasks": VALUES["tasks"][:1]})
    assert one.without_twins().arms == ("expert", "longer", "mlm", "kd", "both")
    less = one.model_copy(update={"arms": ("expert", "mixture")})
    assert less.without_twins().arms == ("expert", "both")
    assert config_of().without_twins() == config_of()


def test_every_point_is_tried_with_seeds_that_are_not_compared():
    config = config_of("search.learning_rate=[1e-5,2e-5]", "search.batch_size=[8,16,32]")
    points = config.search_points()
    assert len({point_name(point) for point in points}) == len(points) == 6
    assert not set(config.seeds_of_search) & set(range(config.seeds))


def test_a_searched_value_is_the_one_that_is_used():
    """YAML reads 1e-5 as a string: the results look for the number that metrics.json has."""
    config = config_of("search.learning_rate=[1e-5,2.0e-5]", "search.batch_size=['16',32]")
    assert config.search == {"learning_rate": (1e-5, 2e-5), "batch_size": (16, 32)}
    for point in config.search_points():
        used = config.finetune_of(config.tasks[0], point).model_dump()
        assert {key: used[key] for key in point} == point


def test_masked_lm_may_be_off_where_no_arm_has_it():
    assert config_of("train.objective.hard.weight=0", "arms=[kd]").arms == ("expert", "kd")


def test_every_arm_has_the_same_budget_but_longer_which_has_twice_it():
    config = config_of("finetune.max_steps=30", "finetune.learning_rate=1e-5")
    for task, epochs in zip(config.tasks, (3, 5), strict=True):
        usual = config.finetune_of(task, {"learning_rate": 2e-5})
        longer = config.finetune_of(task, {"learning_rate": 2e-5}, longer=True)
        assert (usual.epochs, usual.max_steps, usual.learning_rate) == (epochs, 30, 2e-5)
        assert longer == usual.model_copy(update={"epochs": 2 * epochs, "max_steps": 60})


def test_a_tasks_own_settings_are_over_the_files():
    config = config_of(
        "distill.weight=2", "distill.temperature=3", "tasks.b.distill={temperature: 4}"
    )
    a, b = (config.term_of(task, regression=False) for task in config.tasks)
    assert (a.teachers, a.weight, a.temperature, a.divergence) == (("a",), 2, 3, "forward_kl")
    assert (b.teachers, b.weight, b.temperature) == (("b",), 2, 4)
    assert config.term_of(config.tasks[0], regression=True).divergence == "mse"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arms=[best]", "arms"),
        ("tasks.a.nme=x", "did you mean 'name'"),
        ("tasks.a.metric=acuracy", "tasks.0.metric: Input should be 'accuracy', 'f1'"),
        ("tasks.1.name=a", "two tasks are called 'a'"),
        ("tasks=[]", "tasks"),
        ("search.epochs=[1,2]", "the budget"),
        ("search.learning_rate=[]", "no values"),
        ("search.learning_rat=[1e-5]", "did you mean 'learning_rate'"),
        ("finetune.epochs=0", "nothing would be fine-tuned"),
        ("finetune.epochs=auto", "finetune.epochs: Input should be a valid integer"),
        ("tasks.a.finetune={epochs: auto}", "finetune of task 'a'.*valid integer"),
        ("finetune.lr=1e-4", "it is called 'learning_rate' here"),
        ("search.text_columns=[a]", "says what the files mean"),
        ("student.from_scratch=true", "the comparison would be of models"),
        ("student.grow={layers: 3}", "the comparison would be of models"),
        ("student.task=causal_lm", "masked_lm students"),
        ("student.domain_prompts=true", "fine-tuning does not have"),
        ("train.objective.distill=[{teachers: [a]}]", "what the arms set"),
        ("distill.temprature=2", "did you mean 'temperature'"),
        ("tasks.a.distill={wieght: 2}", "did you mean 'weight'"),
        ("tasks.a.finetune={epoch: 2}", "it is called 'epochs' here"),
        ("seeds=0", "seeds"),
        ("tasks.a.name=mean", "the mean over the tasks"),
        ("search.learning_rate=[high]", "learning_rate: Input should be a valid number"),
        ("search.learning_rate=[1e-5, 0.00001]", "a value twice"),
        ("tasks.a.finetune={epochs: 0}", "nothing would be fine-tuned"),
        ("finetune.head=a", "begin with fresh heads"),
        ("train.curriculum={teacher: a}", "the arms that see none"),
        ("train.keep_best=kl/a", "not all students have"),
        ("train.objective.hard.weight=0", "mlm would learn nothing"),
        ("distill.teachers=[b]", "what the arms set"),
        ("tasks.b.distill={weight: 0}", "teach nothing"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(override, words):
    with pytest.raises(InputError, match=words):
        config_of(override)


def test_what_is_written_is_read_as_the_same(tmp_path):
    config = config_of("search.learning_rate=[1e-5,2e-5]", "arms=[both]")
    path = tmp_path / "cycle.yaml"
    path.write_text(dump_config(config))
    assert load_cycle(path) == config


def test_a_cycle_and_a_run_are_told_apart(tmp_path):
    path = tmp_path / "cycle.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    with pytest.raises(InputError, match="pipeline rekindle"):
        load_config(path)
    run = {key: value for key, value in VALUES.items() if key != "tasks"}
    path.write_text(yaml.safe_dump(run | {"cache": {"path": "c"}}))
    with pytest.raises(InputError, match="has no tasks"):
        load_cycle(path)


def test_a_value_that_cannot_name_a_folder_is_refused():
    with pytest.raises(InputError, match="name of a folder"):
        point_name({"x": "a/b"})


BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "glue"


@pytest.mark.parametrize("name", ["glue", "glue_two_cores"])
def test_the_files_of_the_measurements_are_cycles(name):
    config = load_cycle(BENCHMARKS / f"{name}.yaml")
    assert [task.name for task in config.tasks] == ["cola", "sst2", "mrpc", "stsb"]
    assert config.seeds >= 5
    assert config.arms == tuple(ARMS)
    head = load_config(BENCHMARKS / "glue_mlm_head.yaml")
    assert not head.teachers
