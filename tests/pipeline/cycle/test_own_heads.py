"""The head that experts have left a student is scored as it is, beside the student fine-tuned."""

from pathlib import Path

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline.cycle.finetuned import read_finetuned
from rekindle.pipeline.job_functions import FineTuning, score_head
from rekindle.pipeline.processes.jobs import Report
from rekindle.train.answers.config import AskConfig
from rekindle.train.answers.evaluate import evaluate_file
from rekindle.train.finetune.config import ComparisonFinetuneConfig
from testlib.answers.judges import head, saved_student, write


@pytest.fixture(scope="module")
def home(tmp_path_factory, make_model, wordpiece):
    """A student with the heads of two tasks, one of them of a committee, and a task's files."""
    home = tmp_path_factory.mktemp("own")
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, hidden_size=16)
    heads = {"light.0+light.1": head("no", "yes"), "lighter": head("no", "yes")}
    saved_student(home / "student", model, heads)
    words = ["river", "city", "engine", "light", "paper", "the", "old", "water"]
    for task in ("light", "heavy"):
        (home / "tasks" / task).mkdir(parents=True)
        for n, split in enumerate(("train", "dev", "test")):
            rows = [
                {"text": " ".join(words[(k * i + n) % 8] for k in range(1, 6)), "label": answer}
                for i, answer in enumerate(["no", "yes", "no", "no", "yes", "yes", "no"] * 3)
            ]
            write(home / "tasks" / task / f"{split}.jsonl", rows)
    return home


def of(home, task, out, student=0):
    model, files = home / "student", home / "tasks" / task
    return FineTuning(model, files, out, range(student, student + 1), "f1")


@pytest.mark.parametrize("length", [None, 4])
def test_it_scores_what_pipeline_evaluate_does(home, tmp_path, length):
    """Of as much of a text as its fine-tuning reads, where that is told."""
    config = ComparisonFinetuneConfig(max_length=length, positive="yes")
    score_head(of(home, "light", tmp_path / "distilled", student=2), config, Report())
    one = read_finetuned(tmp_path, "distilled", "kd", "light")
    assert one.seeds == [2]
    for split, scores in (("dev", one.per_seed[0].scores), ("test", one.test[0])):
        file = home / "tasks" / "light" / f"{split}.jsonl"
        name = "light.0+light.1"
        asked = {"head": name, "metric": "f1", "config": AskConfig(max_length=length)}
        alone = evaluate_file(str(home / "student"), str(file), **asked)
        assert scores == alone.scores
        assert 0 < scores["f1"] < 1
    assert [path.name for path in Path(tmp_path / "distilled").iterdir()] == ["metrics.json"]


def test_a_student_without_a_head_for_the_task_is_refused(home, tmp_path):
    with pytest.raises(InputError, match=r"light\.0\+light\.1, lighter for the task heavy"):
        score_head(of(home, "heavy", tmp_path / "out"), ComparisonFinetuneConfig(), Report())
    assert not (tmp_path / "out").exists()
