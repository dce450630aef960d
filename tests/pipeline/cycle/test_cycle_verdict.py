"""A cycle begins with one sentence: which arm is best, by how much, and whether that is chance."""

from pathlib import Path

import pytest

from rekindle.pipeline.cycle.finetuned import folder_of
from rekindle.pipeline.cycle.page import cycle_html, printed, verdict_above
from rekindle.pipeline.cycle.results import read_results
from testlib.cycles import TASKS, cycle, edit, score, scores_of


def scored(out, gains, tasks=("cola",), seeds=3):
    """A cycle of these arms, whose scores are the expert's and so much more, seed by seed."""
    arms = ("expert", *gains)
    cycle(out, arms, tasks, search={}, seeds=seeds)
    for arm, more in gains.items():
        for task in tasks:

            def gain(metrics, arm=arm, more=more, task=task):
                for run, one in zip(metrics["per_seed"], more, strict=True):
                    run["test_scores"] = scores_of(task, score("expert", task, run["seed"]) + one)

            edit(out / folder_of(arm, task) / "metrics.json", gain)
    return read_results(out)


SURE, UNSURE, WORSE = (0.05, 0.051, 0.049), (0.05, -0.04, 0.02), (-0.05, -0.051, -0.049)


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ({"both": SURE}, ["both beats expert on cola: matthews ", ", +5.00 [+4.75, +5.25] points"]),
        ({"both": SURE}, ["over expert, more than chance (higher in 3 of 3 seeds)"]),
        ({"kd": UNSURE}, ["not told apart (higher in 2 of 3 seeds)"]),
        (
            {"mlm": (0.0, 0.001, 0), "both": SURE},
            ["over mlm (the text alone) +4.97", "than chance"],
        ),
        (
            {"longer": (0.04, 0.051, 0.049), "both": SURE},
            ["longer (twice the epochs) +0.33", "not told apart"],
        ),
        (
            {"kd": SURE, "both": (0.3, 0.0, 0.0)},
            ["kd beats", "; both has ", "told apart from expert"],
        ),
        (
            {"both": UNSURE},
            ["no arm is shown to beat expert on cola", "both has the highest score"],
        ),
        (
            {"kd": (0.25, 0.25)},
            ["shown to beat expert on cola: kd has", "the same every time, so that no test can be"],
        ),
        ({"kd": WORSE}, ["no arm is shown to beat expert", "the next, kd, "]),
    ],
)
def test_the_sentence_names_the_best_arm_and_by_how_much(tmp_path, gains, words):
    told = scored(tmp_path, gains, seeds=len(next(iter(gains.values())))).verdict
    assert [word for word in words if word not in told] == []
    assert "\n" not in told


def test_several_tasks_are_judged_by_their_mean_and_one_seed_by_nothing(tmp_path):
    many = scored(tmp_path / "many", {"kd": SURE}, ("cola", "mrpc"))
    assert many.verdict.startswith("kd beats expert on the mean over 2 tasks: ")
    once = scored(tmp_path / "once", {"kd": SURE[:1]}, seeds=1).verdict
    assert once.startswith("no arm is shown to beat expert on cola")
    assert once.endswith("one seed says nothing of chance")


def test_page_and_stdout_begin_with_it_and_name_the_experts_and_the_rows(tmp_path):
    results = scored(tmp_path, {"both": SURE})
    (kept,) = results.experts
    dev = [0.4 + 0.05 * ((3 * seed + 1) % 5) for seed in range(3)]  # as ``testlib.cycles`` has it
    assert (kept.seed, kept.dev) == (dev.index(max(dev)), max(dev))
    text = printed(tmp_path, results)
    assert " ".join(text.split()).startswith(results.verdict[:1].upper() + results.verdict[1:])
    page = cycle_html(tmp_path, (), results)
    assert page.index(results.verdict[1:]) < page.index("<section>") < page.index(">In short<")
    folded = " ".join(text.split())
    for told in (
        f"seed {kept.seed} of 3, the best on dev: matthews {kept.dev:.4f} on dev (experts/cola)",
        f"{TASKS['cola']['train']:,} labelled rows to train on, 551 dev, 1,043 test",
    ):
        assert told in folded
        assert told in page
    assert "1 task, 2 arms" in page
    assert verdict_above([tmp_path]).split()[:3] == ["Both", "beats", "expert"]
    assert verdict_above([tmp_path, tmp_path]) == verdict_above([tmp_path / "experts"]) == ""
    assert Path(tmp_path, "experts/cola").is_dir()
