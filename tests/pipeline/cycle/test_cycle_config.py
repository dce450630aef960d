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
from rekindle.pipeline.cycle.arms import DEFAULT_ARMS
from rekindle.pipeline.cycle.config import CycleConfig, load_cycle
from rekindle.pipeline.cycle.page import commands_of
from rekindle.pipeline.cycle.record import resumed_config
from rekindle.pipeline.cycle.sections import point_name
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
    assert config.arms == DEFAULT_ARMS
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
    assert not set(config.search_seed_range) & set(range(config.seeds))


def test_a_searched_value_is_the_one_that_is_used():
    """YAML reads 1e-5 as a string: the results look for the number that metrics.json has."""
    config = config_of("search.learning_rate=[1e-5,2.0e-5]", "search.batch_size=['16',32]")
    assert config.search == {"learning_rate": (1e-5, 2e-5), "batch_size": (16, 32)}
    for point in config.search_points():
        used = config.finetune_of(config.tasks[0], point, "kd").model_dump()
        assert {key: used[key] for key in point} == point


def test_masked_lm_may_be_off_where_no_arm_has_it():
    assert config_of("train.objective.hard.weight=0", "arms=[kd]").arms == ("expert", "kd")


def test_every_arm_has_the_same_budget_but_longer_which_has_twice_it():
    config = config_of("finetune.max_steps=30", "finetune.learning_rate=1e-5")
    for task, epochs in zip(config.tasks, (3, 5), strict=True):
        usual = config.finetune_of(task, {"learning_rate": 2e-5}, "kd")
        longer = config.finetune_of(task, {"learning_rate": 2e-5}, "longer")
        assert (usual.epochs, usual.max_steps, usual.learning_rate) == (epochs, 30, 2e-5)
        assert longer == usual.model_copy(update={"epochs": 2 * epochs, "max_steps": 60})


def test_a_tasks_own_settings_are_over_the_files():
    config = config_of(
        "distill.weight=2", "distill.temperature=3", "tasks.b.distill={temperature: 4}"
    )
    a, b = (config.term_of(task, False, "kd") for task in config.tasks)
    assert (a.teachers, a.weight, a.temperature, a.divergence) == (("a",), 2, 3, "forward_kl")
    assert (b.teachers, b.weight, b.temperature) == (("b",), 2, 4)
    assert config.term_of(config.tasks[0], True, "kd").divergence == "mse"


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
        ("student.from_scratch=true", "the comparison would be between models"),
        ("student.grow={layers: 3}", "the comparison would be between models"),
        ("student.task=causal_lm", "masked_lm students"),
        ("student.domain_prompts=true", "fine-tuning does not have"),
        ("student.lora={r: 2}", "trains other weights than the fine-tunings"),
        ("train.objective.distill=[{teachers: [a]}]", "what the arms set"),
        ("distill.temprature=2", "did you mean 'temperature'"),
        ("tasks.a.distill={wieght: 2}", "did you mean 'weight'"),
        ("tasks.a.finetune={epoch: 2}", "it is called 'epochs' here"),
        ("seeds=0", "seeds"),
        ("tasks.a.name=mean", "the mean over the tasks"),
        ("search.learning_rate=[high]", "learning_rate: Input should be a valid number"),
        ("search.learning_rate=[1e-5, 0.00001]", "a value twice"),
        ("search.evaluate_every=[1, 3]", "evaluate_every changes no score"),
        ("tasks.a.finetune={epochs: 0}", "nothing would be fine-tuned"),
        ("finetune.head=a", "begin with fresh heads"),
        ("train.curriculum={teacher: a}", "the arms that see none"),
        ("train.keep_best=kl/a", "not all students have"),
        ("train.objective.hard.weight=0", "the arm 'mlm' would learn nothing"),
        ("distill.teachers=[b]", "what the arms set"),
        ("tasks.b.distill={weight: 0}", "teach nothing"),
        ("experts.finetune={epochs: 9}", "experts of another model"),
        ("experts={model: model, finetune: {epochs: 9}}", "experts of another model"),
        ("experts={model: other, finetune: {epochs: 0}}", "nothing would be fine-tuned"),
        ("experts={model: other, finetune: {epoch: 2}}", "experts.finetune.*'epochs' here"),
        ("experts={model: other, finetune: {label_field: y}}", "what the files mean"),
        ("experts.teacher=both", "experts.teacher: Input should be 'best' or 'all'"),
        ("pseudo={confidence: 0.5}", "arm pseudo, which is not among"),
        ("tasks.a.corpus={source: [a.txt]}", "task 'b' has none"),
        ("corpus={tokenizer: model}", "corpus.source is missing"),
        ("students=0", "students"),
        ("experts.seeds=0", "experts.seeds"),
        ("tasks.a={name: a, train: t, test: u, train_examples: 9, train_per_class: 3}", "give one"),
        ("students=6", "students is 6 and seeds 5"),
        ("test_texts=drop", "test_texts: Input should be 'remove' or 'keep'"),
        (
            "corpus={source: [a], tokenizer: m, without: [b], without_fields: [q]}",
            "the tasks' test files, which have their own fields.*test_texts: keep",
        ),
        ("label_draws=0", "label_draws"),
        ("tasks.b.name=a.1", "cannot be called 'a.1' beside 'a'"),
        ("primary={arm: kd, against: [start, pseudo]}", "primary names pseudo.*not among"),
        ("primary={arm: kd, against: [kd]}", "primary names kd twice"),
        ("primary={arm: kd, against: [expert, start]}", "expert twice .start is expert here"),
        ("primary={arm: kd, against: []}", "primary.against"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(override, words):
    with pytest.raises(InputError, match=words):
        config_of(override)


@pytest.mark.parametrize(
    ("pseudo", "words"),
    [
        ({"divergence": "mse"}, "pseudo.divergence is what the arms set"),
        ({"temperature": 2}, "pseudo.temperature"),
        ({"weight": 0}, "would teach nothing"),
        ({"confidense": 0.5}, "did you mean 'confidence'"),
    ],
)
def test_a_term_of_hard_labels_is_checked(pseudo, words):
    with pytest.raises(InputError, match=words):
        parse_settings(CycleConfig, VALUES | {"arms": ["pseudo"], "pseudo": pseudo})


def test_hard_labels_are_taken_from_the_best_expert_whatever_teaches_the_others():
    config = config_of(
        *("arms=[pseudo,kd,both,mixture]", "experts.teacher=all", "seeds=2"),
        *("distill={temperature: 2, weight: 3, view: masked}", "pseudo={confidence: 0.4}"),
    )
    hard = config.term_of(config.tasks[0], False, "pseudo")
    assert (hard.teachers, hard.divergence, hard.confidence) == (("a",), "pseudo_label", 0.4)
    assert (hard.weight, hard.view, hard.temperature) == (3, "masked", 1)
    for arm in ("kd", "both", "mixture"):
        term = config.term_of(config.tasks[0], False, arm)
        assert (term.teachers, term.combine, term.temperature) == (("a.0", "a.1"), "mixture", 2)
    plain = parse_settings(CycleConfig, VALUES | {"arms": ["pseudo"]})
    assert plain.term_of(plain.tasks[0], False, "pseudo").confidence == 0


def test_experts_of_another_model_are_beside_the_students_own_model():
    config = config_of(
        *("experts={model: other, finetune: {epochs: 9}}", "arms=[kd]"),
        *("search.learning_rate=[1e-5,2e-5]", "finetune.batch_size=7"),
    )
    assert config.arms == config.without_twins().arms == ("expert", "start", "kd")
    tuned = {
        arm: config.finetune_of(config.tasks[1], {"learning_rate": 2e-5}, arm)
        for arm in ("expert", "start", "longer")
    }
    assert {arm: one.epochs for arm, one in tuned.items()} == {
        "expert": 9,
        "start": 5,
        "longer": 10,
    }
    assert {one.batch_size for one in tuned.values()} == {7}
    assert {one.learning_rate for one in tuned.values()} == {2e-5}


@pytest.mark.parametrize("where", ["experts", "tasks.b"])
def test_what_is_searched_is_not_given_beside_it(where, tmp_path):
    """What an older version began with both goes on."""
    given = [f"{where}.finetune.learning_rate=1e-3", "experts.model=other"]
    assert resumed_config(tmp_path, config_of(*given)).unused_settings == []
    both = config_of(*given, "search.learning_rate=[1e-5,2e-5]")
    with pytest.raises(InputError, match=rf"{where}\.finetune\.learning_rate is searched"):
        resumed_config(tmp_path, both)
    begun = {"settings": both.model_dump(mode="json", by_alias=True)}
    (tmp_path / "cycle.json").write_text(json.dumps(begun))
    assert resumed_config(tmp_path, both).search == both.search


def test_experts_may_have_seeds_of_their_own():
    config = config_of("experts.seeds=3", "seeds=1", "search.batch_size=[8,16]", "search_seeds=2")
    assert config.teachers_of("a", "committee") == ["a.0", "a.1", "a.2"]
    assert config.search_seed_range == range(3, 5)
    assert config_of("experts.seeds=2").search_seed_range == range(5, 6)
    assert "committee" not in config.twins
    assert config_of("experts.seeds=1").twins["committee"] == "kd"
    lines = dict(commands_of(Path("home"), config, {}))
    assert "--seeds 3 " in lines["The expert on a"]
    assert "--seeds 1 " in lines["The student fine-tuned on the task"]


@pytest.mark.parametrize(
    ("overrides", "arms"),
    [
        (("arms=[start,committee]",), ("expert", "committee")),
        (("arms=[start,committee]", "seeds=1"), ("expert", "kd")),
        (("arms=[committee]", "experts.teacher=all"), ("expert", "kd")),
        (("arms=[committee,kd]", "experts.model=other"), ("expert", "start", "kd", "committee")),
    ],
)
def test_an_arm_that_is_another_one_again_is_left_out(overrides, arms):
    assert config_of(*overrides).without_twins().arms == arms


def test_what_is_named_before_holds_for_what_stands_in():
    config = config_of("arms=[mlm,longer,kd]", "primary={arm: kd, against: [start, longer, mlm]}")
    assert config.without_twins().primary.against == ("expert", "longer", "mlm")


def test_every_task_may_have_a_text_of_its_own():
    config = config_of(
        *("corpus={tokenizer: model, sequence_length: 32}", "tasks.a.corpus={source: [a.txt]}"),
        "tasks.b.corpus={source: [b.txt], sequence_length: 64}",
    )
    texts = {name: config.corpus_of(name) for name in config.text_names}
    assert {name: one.source for name, one in texts.items()} == {"a": ("a.txt",), "b": ("b.txt",)}
    assert [one.sequence_length for one in texts.values()] == [32, 64]
    assert [config.cache_of(name).path for name in texts] == ["/a", "/b"]
    with pytest.raises(InputError, match=r"corpus of task 'a'.*did you mean 'source'"):
        config_of("tasks.a.corpus={sorce: [a.txt]}", "tasks.b.corpus={source: [b.txt]}")
    with pytest.raises(InputError, match=r"students always use that of student\.model"):
        config_of("tasks.a.corpus={tokenizer: x}", "tasks.b.corpus={source: [b.txt]}")


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
    assert config.seeds * config.label_draws >= 5
    assert config.arms == DEFAULT_ARMS
    head = load_config(BENCHMARKS / "glue_mlm_head.yaml")
    assert not head.teachers
