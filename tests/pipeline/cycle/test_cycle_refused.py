"""What does not fit together in a cycle's folder is refused, never compared."""

import json
import math
import shutil

import pytest

from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.scores import MEAN, CycleResults
from testlib.cycles import ARMS, TASKS, about, cycle, edit, finetuned, metrics_of, searched, write

# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("epochs", 4), ("batch_size", 16), ("warmup", 0.2), ("patience", 2), ("max_steps", 100)),
        *(("betas", [0.9, 0.98]), ("eps", 1e-6)),
    ],
)
def test_another_budget_is_refused_with_both_folders(out, key, value):
    path = out / "fine-tuned/kd/mrpc/metrics.json"
    edit(path, lambda metrics: metrics["config"].update({key: value}))
    with pytest.raises(CheckpointError, match=rf"experts/mrpc and .*kd/mrpc .*{key}"):
        read_results(out)


def test_results_without_keys_of_adamw_are_alike_those_with_what_it_was(out):
    path = out / "fine-tuned/kd/mrpc/metrics.json"
    edit(path, lambda metrics: metrics["config"].update(betas=[0.9, 0.999], eps=1e-8))
    assert read_results(out).differences


def test_results_are_alike_however_often_dev_was_scored(out):
    path = out / "fine-tuned/kd/mrpc/metrics.json"
    edit(path, lambda metrics: metrics["config"].update(evaluate_every=5))
    assert read_results(out).differences


@pytest.mark.parametrize(("positive", "same"), [("yes", True), ("no", False)])
def test_f1_of_another_class_than_older_results_have_is_refused(out, positive, same):
    path = out / "fine-tuned/kd/mrpc/metrics.json"
    edit(path, lambda m: m.update(positive=positive, config=m["config"] | {"positive": None}))
    if same:
        assert read_results(out).differences
        return
    with pytest.raises(CheckpointError, match="cannot be compared: positive is 'yes' in the first"):
        read_results(out)


def test_longer_must_be_twice_as_long(out):
    path = out / "fine-tuned/longer/cola/metrics.json"
    for epochs in (3, 5, 12):
        edit(path, lambda metrics, epochs=epochs: metrics["config"].update(epochs=epochs))
        with pytest.raises(CheckpointError, match=r"epochs \(longer: halved\)"):
            read_results(out)


def test_longer_has_twice_the_steps_where_they_are_limited(tmp_path):
    out = cycle(tmp_path / "c", ARMS[:2], ["cola"], search={})
    for arm, steps in (("expert", 50), ("longer", 100)):
        path = out / folder_of(arm, "cola") / "metrics.json"
        edit(path, lambda metrics, steps=steps: metrics["config"].update(max_steps=steps))
    assert read_results(out).differences
    edit(path, lambda metrics: metrics["config"].update(max_steps=50))
    with pytest.raises(CheckpointError, match="max_steps"):
        read_results(out)


def test_what_test_shares_with_train_is_told(out):
    assert not any("also in train" in note for note in read_results(out).notes)
    edit(out / "cycle.json", lambda m: m["tasks"]["mrpc"].update(test_in_train=1234))
    results = read_results(out)
    assert "test examples whose text is also in train: 1,234 of mrpc" in results.notes
    assert CycleResults.from_dict(json.loads(json.dumps(results.as_dict()))) == results


def test_a_precision_that_was_searched_may_differ_between_arms(tmp_path):
    for name, search in (("searched", {"precision": ["fp32", "bf16"]}), ("not", {})):
        out = cycle(tmp_path / name, ARMS[:2], ["cola"], search={})
        for arm, precision in zip(ARMS[:2], ("fp32", "bf16"), strict=True):
            path = out / folder_of(arm, "cola") / "metrics.json"
            edit(path, lambda m, p=precision: m.update(precision=p))
            edit(path, lambda m, p=precision: m["config"].update(precision=p))
            for value, dev in (("fp32", 0.5), ("bf16", 0.5)) if search else ():
                tried = metrics_of(
                    out, arm, "cola", seeds=1, test=False, dev=[dev], config={"precision": value}
                )
                write(out / f"search/{arm}/cola/{value}/metrics.json", tried | {"precision": value})
        edit(out / "cycle.json", lambda m, search=search: m.update(search=search))
        if search:
            assert {one.chosen["precision"] for one in read_results(out).searched} == {
                "fp32",
                "bf16",
            }
        else:
            with pytest.raises(CheckpointError, match="precision"):
                read_results(out)


def test_a_setting_that_only_one_has_is_refused(out):
    edit(out / "fine-tuned/kd/cola/metrics.json", lambda m: m["config"].pop("warmup"))
    with pytest.raises(CheckpointError, match="warmup"):
        read_results(out)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["files"].update(train="other/cola/train.jsonl"), "files"),
        (lambda m: m.update(precision="bf16"), "precision in use"),
        (lambda m: m.update(label_names=["yes", "no"]), "label_names"),
        (lambda m: m.update(metric="accuracy"), "metric"),
        (lambda m: m["per_seed"][0].update(seed=9), "seeds"),
        (lambda m: m["per_seed"].pop(), "4 seeds"),
        (lambda m: [run.update(test_scores=None) for run in m["per_seed"]], "no test scores"),
        (lambda m: m["per_seed"][2].update(seed=0), "seeds"),
        (lambda m: m.update(best_seed=0), "not the best on dev"),
        (lambda m: m.update(best_seed=77), "finetune"),
        (lambda m: m["per_seed"][0]["test_scores"].pop("matthews"), "matthews"),
        (lambda m: m["per_seed"][0]["test_scores"].update(matthews="0.5"), "finetune"),
        (lambda m: m["per_seed"][0]["test_scores"].update(matthews=math.nan), "NaN"),
        (lambda m: m.pop("config"), "config"),
        (lambda m: m.update(written_by="someone"), "someone"),
        (lambda m: m.update(per_seed=3), "finetune"),
    ],
)
def test_doubtful_data_is_refused(out, change, told):
    edit(out / "fine-tuned/both/cola/metrics.json", change)
    with pytest.raises(CheckpointError, match=told) as caught:
        read_results(out)
    assert "both/cola" in str(caught.value)


def test_experts_with_seeds_of_their_own_have_the_same_budget(tmp_path):
    out = cycle(tmp_path / "c", ARMS[:2], ["cola"], search={}, experts={"seeds": 2})
    finetuned(out, "expert", "cola", seeds=2)
    assert {len(one.scores) for one in read_results(out).scores if one.task == "cola"} >= {2, 5}
    edit(out / "experts/cola/metrics.json", lambda m: m["config"].update(batch_size=77))
    with pytest.raises(CheckpointError, match="batch_size"):
        read_results(out)


def test_seeds_must_be_the_same_across_tasks(tmp_path):
    """Or else the mean over tasks would be over runs that have nothing in common."""
    out = cycle(tmp_path / "c", ARMS[:2], ["cola", "mrpc"], search={})
    for arm in ARMS[:2]:
        path = out / folder_of(arm, "mrpc") / "metrics.json"
        edit(path, lambda m: [run.update(seed=run["seed"] + 5) for run in m["per_seed"]])
        edit(path, lambda m: m.update(best_seed=m["best_seed"] + 5))
    with pytest.raises(CheckpointError, match=r"cola and .*mrpc .* seeds"):
        read_results(out)


def test_an_arm_that_was_searched_otherwise_is_refused(out):
    searched(out, "both", "cola", seeds=3, dev=[0.5, 0.4, 0.3])
    with pytest.raises(CheckpointError, match=r"search/.*seeds"):
        read_results(out)


def test_an_arm_that_was_searched_less_is_refused(out):
    shutil.rmtree(out / "search/both/cola/0.0001")
    with pytest.raises(CheckpointError, match=r"lacks learning_rate 0\.0001"):
        read_results(out)


def test_a_setting_outside_the_search_is_refused(out):
    metrics = metrics_of(
        out, "both", "cola", seeds=2, test=False, dev=[0.5, 0.4], config={"learning_rate": 1e-3}
    )
    write(out / "search/both/cola/0.001/metrics.json", metrics)
    with pytest.raises(CheckpointError, match="does not belong to this search"):
        read_results(out)


def test_a_choice_that_dev_did_not_make_is_refused(out):
    """Such as one by test scores."""
    finetuned(out, "both", "cola", config={"learning_rate": 1e-4})
    with pytest.raises(CheckpointError, match="not what its search"):
        read_results(out)


@pytest.mark.parametrize(
    "name",
    [
        "cycle.json",
        "experts/cola/metrics.json",
        "search/kd/cola/5e-05/metrics.json",
        "students/mlm/summary.json",
    ],
)
@pytest.mark.parametrize("content", ["", '{"cut off', "[1]", '{"mean": NaN}'])
def test_damaged_json_is_named(out, name, content):
    (out / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_results(out)
    assert name in str(caught.value)


def test_what_is_no_cycle_is_the_users_mistake(tmp_path):
    with pytest.raises(InputError, match="not a directory of"):
        read_results(tmp_path / "nowhere")
    write(tmp_path / "cycle.json", {"written_by": "another"})
    with pytest.raises(InputError, match="not a directory of"):
        read_results(tmp_path)


@pytest.mark.parametrize("name", ["../cola", "a/b", "", "..", MEAN])
def test_names_stay_in_the_cycles_directory(tmp_path, name):
    write(tmp_path / "cycle.json", about() | {"tasks": {name: TASKS["cola"]}})
    with pytest.raises(CheckpointError, match="is not a valid name"):
        read_results(tmp_path)


def test_a_task_without_its_sizes_is_damage(tmp_path):
    write(tmp_path / "cycle.json", about() | {"tasks": {"cola": {"metric": "matthews"}}})
    with pytest.raises(CheckpointError, match="train"):
        read_results(tmp_path)


def test_a_cycle_may_be_moved_and_resumed(out):
    """Its paths in metrics.json are then of two places."""
    path = out / "fine-tuned/both/cola/metrics.json"
    edit(path, lambda m: m["files"].update(train="elsewhere/tasks/cola/train.jsonl"))
    assert read_results(out).differences


def test_other_packages_are_told(out):
    path = out / "fine-tuned/both/cola/metrics.json"
    edit(path, lambda metrics: metrics["versions"].update(torch="2.12"))
    assert any("same torch" in note for note in read_results(out).notes)
