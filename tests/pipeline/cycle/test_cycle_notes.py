"""Whether guidance helps is said in one sentence, where it does not."""

from pathlib import Path

from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.notes import UNHELPFUL
from rekindle.pipeline.cycle.results import read_results
from testlib.cycles import cycle, edit, score, scores_of


def guided(out, gains, arms=("expert", "mlm", "mixture"), tasks=("cola", "mrpc")):
    """A cycle in which the last arm's score is the student of the text's and ``gains``, by seed."""
    cycle(out, arms, tasks, search={}, seeds=len(gains))

    def gain(metrics):
        for run, more in zip(metrics["per_seed"], gains, strict=True):
            task = Path(metrics["files"]["test"]).parent.name
            run["test_scores"] = scores_of(task, score(arms[-2], task, run["seed"]) + more)

    for task in tasks:
        edit(out / folder_of(arms[-1], task) / "metrics.json", gain)
    return [note for note in read_results(out).notes if note.startswith(UNHELPFUL)]


def test_where_guidance_does_not_help_one_sentence_says_so(tmp_path):
    (note,) = guided(tmp_path / "more", [0.01, -0.01, 0.02])
    assert "than mlm on the mean over tasks by more than chance (mixture +0.67 (" in note
    (note,) = guided(tmp_path / "less", [-0.02, -0.021, -0.019])  # surely worse
    assert "(mixture -2.00 (" in note
    (note,) = guided(tmp_path / "once", [0.05])
    assert note.endswith("(mixture +5.00 with one seed, in points)")
    assert guided(tmp_path / "helps", [0.02, 0.021, 0.019]) == []
    (note,) = guided(tmp_path / "equal", [0.125, 0.125])  # of two seeds: often by chance
    assert "(mixture +12.50 (+12.50 … +12.50), in points)" in note


def test_without_the_student_of_the_text_guidance_is_held_against_the_expert(tmp_path):
    (note,) = guided(tmp_path / "c", [0.01, -0.01, 0.02], ("expert", "kd"), ["cola"])
    assert "no student of experts scores more than expert on cola by more than chance (kd" in note


def test_without_students_of_experts_nothing_is_said_of_guidance(tmp_path):
    assert guided(tmp_path / "c", [0.01, -0.01, 0.02], ("expert", "mlm"), ["cola"]) == []


def test_an_f1_of_more_than_two_classes_is_said_to_be_their_mean(tmp_path):
    cycle(tmp_path, ("expert",), ("mrpc",), search={})
    assert not any(note.startswith("f1 of") for note in read_results(tmp_path).notes)
    names = {"label_names": ["no", "yes", "perhaps"]}
    edit(tmp_path / folder_of("expert", "mrpc") / "metrics.json", lambda one: one.update(names))
    assert "f1 of mrpc is the unweighted mean over classes (macro)" in read_results(tmp_path).notes
