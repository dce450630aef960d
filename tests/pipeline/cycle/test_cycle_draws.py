"""Several draws of the labels, students and arms: what is compared, over what, and what it cost."""

import json
import shutil
from itertools import product
from statistics import fmean

import pytest
from scipy import stats

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import build_corpus
from rekindle.data.errors import CheckpointError
from rekindle.data.storage.store import LocalStore
from rekindle.pipeline.cycle.finetuned import folder_of, own_head, own_head_folder
from rekindle.pipeline.cycle.notes import UNLEARNED
from rekindle.pipeline.cycle.page import cycle_html, printed
from rekindle.pipeline.cycle.results import read_results
from rekindle.pipeline.cycle.scores import MEAN, CycleResults
from rekindle.pipeline.cycle.tables import as_text, own_head_tables, tables_of
from rekindle.pipeline.report.significance import holm
from testlib.cycles import (
    cycle,
    drawn,
    edit,
    finetuned,
    metrics_of,
    own_head_gain,
    own_head_scored,
    rows_of,
    score,
    scores_of,
    student,
    write,
)

DRAWS, SEEDS = 4, 2
ARMS = ["expert", "longer", "mlm", "pseudo", "kd", "committee"]
FEW = ["cola", "mrpc"]
PRIMARY = {"arm": "kd", "against": ["expert", "longer", "mlm"], "about": "said before"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("draws") / "whole"
    drawn(out, ARMS, FEW, seeds=SEEDS, draws=DRAWS, primary=PRIMARY)
    for draw, task in product(range(DRAWS), FEW):
        home = out / "draws" / str(draw)
        own_head_scored(home, "kd", task, draw=draw)
        student(home, f"kd-{task}", 50.0 + draw, **{task: 7.0})
        student(home, f"committee-{task}", 40.0, **{f"{task}.{n}": 2.0 for n in range(SEEDS)})
        student(home, "mlm", 30.0)
    return out


@pytest.fixture(scope="module")
def results(made):
    return read_results(made)


@pytest.fixture(scope="module")
def page(made, results):
    return cycle_html(made, (), results)


@pytest.fixture
def out(made, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "copy")


def by_draw(arm, task):
    return [fmean(score(arm, task, seed, draw) for seed in range(SEEDS)) for draw in range(DRAWS)]


def one_difference(results, *names):
    (one,) = [d for d in results.differences if (d.arm, d.against, d.task) == names]
    return one


# --- draws ----------------------------------------------------------------------------------------


def test_a_draw_counts_once_however_many_seeds_it_has(results):
    for arm, task in product(ARMS, FEW):
        one = results.main[arm, task]
        assert one.seeds == list(range(DRAWS))
        assert one.scores == pytest.approx(by_draw(arm, task))
    means = [fmean(both) for both in zip(*(by_draw("kd", task) for task in FEW), strict=True)]
    assert results.main["kd", MEAN].scores == pytest.approx(means)
    for against in ("expert", "longer", "mlm", "pseudo"):
        one = one_difference(results, "committee", against, "mrpc")
        test = stats.ttest_rel(by_draw("committee", "mrpc"), by_draw(against, "mrpc"))
        assert one.p == pytest.approx(test.pvalue)
        assert (one.low, one.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert one.n == DRAWS


def test_the_primary_comparison_is_a_family_of_its_own(results):
    primary = results.primary
    assert [(d.arm, d.against, d.task) for d in primary.differences] == [
        ("kd", against, MEAN) for against in PRIMARY["against"]
    ]
    tests = [
        stats.ttest_rel(results.main["kd", MEAN].scores, results.main[against, MEAN].scores).pvalue
        for against in PRIMARY["against"]
    ]
    assert [d.p for d in primary.differences] == pytest.approx(tests)
    assert [d.p_adjusted for d in primary.differences] == pytest.approx(holm(tests))
    among = [one_difference(results, "kd", arm, MEAN).p_adjusted for arm in PRIMARY["against"]]
    assert among != [d.p_adjusted for d in primary.differences]  # of other families
    assert results.verdict.startswith("kd ")
    assert "(primary comparison): over expert +" in results.verdict
    assert any("over these 3 alone" in note for note in results.notes)
    first, *others = tables_of(results)
    assert first.title.startswith("primary comparison, named before anything ran: on the mean")
    assert [row[0] for row in rows_of(first)] == PRIMARY["against"]
    assert others[0].title.startswith("secondary: test scores")
    assert all(t.title.startswith("secondary") for t in others if "differences" in t.title)


def test_an_arm_that_a_draw_lacks_is_said_and_left_out(out):
    shutil.rmtree(out / "draws/2" / folder_of("longer", "mrpc"))
    shutil.rmtree(out / "draws/1" / "distilled")
    results = read_results(out)
    (said,) = [note for note in results.notes if "some draws lack them" in note]
    assert "longer on mrpc (draw 2); kd (own head) on cola (draw 1)" in said
    assert ("longer", "mrpc") not in results.main
    assert ("longer", MEAN) not in results.main
    assert results.main["longer", "cola"].seeds == list(range(DRAWS))
    assert results.main["kd", MEAN].seeds == list(range(DRAWS))
    assert "longer" not in {one.arm for one in results.arm_costs}
    assert [one.against for one in results.primary.differences] == ["expert", "mlm"]
    # Adjusted as before: for all that are planned, and no surer for what is missing.
    tests = [one.p for one in results.primary.differences]
    told = [one.p_adjusted for one in results.primary.differences]
    assert told == holm([*tests, 1.0])[:2] != holm(tests)
    (how,) = [note for note in results.notes if "paired t-tests were made" in note]
    assert "13 against expert" in how
    assert "as for all that are planned (15 against expert, " in how
    made = [one.p for one in results.differences if one.against == "expert"]
    known = [one.p_adjusted for one in results.differences if one.against == "expert"]
    assert len(made) == 13
    assert known == holm([*made, 1.0, 1.0])[:13]
    assert "with longer on the mean over 2 tasks, is not known yet" in results.verdict


def test_draws_that_have_not_ended_are_said_and_not_read(out):
    (out / "draws/1/results.json").unlink()
    write(out / "draws/1" / folder_of("kd", "cola") / "metrics.json", {"half": "written"})
    shutil.rmtree(out / "draws/3")
    results = read_results(out)
    assert results.draws == results.main["kd", "cola"].seeds == [0, 2]
    assert "not there yet: draw 1, 3 of the 4 draws of the labels" in results.notes[0]
    assert any("fewer than 5 draws of the labels" in note for note in results.notes)
    for draw in (0, 2):
        (out / f"draws/{draw}/results.json").unlink()
    nothing = read_results(out)
    assert nothing.scores == []
    assert (
        nothing.verdict
        == "the primary comparison, of kd on the mean over 2 tasks, is not known yet"
    )
    assert "nothing is fine-tuned yet" in as_text(nothing, 300)


def test_a_task_that_has_fewer_draws_has_no_part_in_a_mean(out):
    """As while the cells of the tasks are run one after another."""
    for draw, arm in product((1, 2, 3), ARMS):
        shutil.rmtree(out / f"draws/{draw}" / folder_of(arm, "mrpc"))
        shutil.rmtree(out / f"draws/{draw}" / "distilled/kd/mrpc", ignore_errors=True)
    results = read_results(out)
    assert results.main["kd", "cola"].seeds == list(range(DRAWS))
    assert results.main["kd", "mrpc"].seeds == [0]
    assert not any(task == MEAN for _, task in results.main)
    assert any("without a mean over tasks" in note for note in results.notes)


def test_draws_that_were_added_later_are_said(out):
    """Whoever adds draws until a test holds will see one hold."""

    def said(first):
        edit(out / "cycle.json", lambda v: v.update(draws_at_first=first))
        return [note for note in read_results(out).notes if "asked for later" in note]

    assert said(DRAWS) == []
    (note,) = said(1)
    assert note.startswith("the cycle was begun with 1 draw of the labels, and 3 more were")


def test_the_search_is_of_the_first_draw_and_goes_for_all(out):
    results = read_results(out)
    assert {one.task for one in results.searched} == {*FEW}
    assert any("searched in draw 0, and taken over" in note for note in results.notes)
    alone = read_results(out / "draws" / "2")
    assert alone.searched[0].chosen == {"learning_rate": 5e-5}
    other = {"learning_rate": 2e-5}
    finetuned(out / "draws/2", "kd", "cola", seeds=SEEDS, config=other, draw=2)
    with pytest.raises(CheckpointError, match=r"not what its search in .*/0/search/kd/cola found"):
        read_results(out)


def test_what_has_learned_nothing_is_named_with_its_draws(out):
    for draw, task in [*product(range(DRAWS), ["cola"]), (1, "mrpc")]:
        path = out / "draws" / str(draw) / folder_of("mlm", task) / "metrics.json"
        edit(path, lambda m: m["per_seed"][0].update(warning="weak"))
    (note,) = [note for note in read_results(out).notes if note.startswith(UNLEARNED)]
    assert note.startswith(f"{UNLEARNED} by mlm on cola; mlm on mrpc (draw 1): on dev")


def test_draws_of_other_budgets_are_refused(out):
    for arm, task in product(ARMS, FEW):
        other = {"batch_size": 8}
        finetuned(out / "draws/3", arm, task, seeds=SEEDS, config=other, draw=3)
    with pytest.raises(
        CheckpointError, match=r"draws/0/experts/cola .*cannot be compared: batch_size"
    ):
        read_results(out)


# --- the text of the draws ------------------------------------------------------------------------


def test_draws_whose_students_have_read_other_texts_are_refused(out):
    """Of other bytes it is the same text where the caches say so."""

    def read(draw, name, corpus, text=""):
        home = out / "draws" / str(draw)
        cache = {"corpus": corpus, "path": str(home / "cache" / text)}
        edit(home / "students" / name / "run.json", lambda run: run["cache"].update(cache))

    for draw in range(DRAWS):
        read(draw, "kd-cola", "one")
    read_results(out)
    read(2, "kd-cola", "other")
    told = r"draws 0 and 2 of the labels in .* different texts, .*remove .*draws/2 and run --draw 2"
    with pytest.raises(CheckpointError, match=told):
        read_results(out)
    for task in FEW:  # a text for each task
        for draw in range(DRAWS):
            write(out / "draws" / str(draw) / "costs/texts" / task / "corpus/done.json", {})
            read(draw, f"kd-{task}", f"one of {task}", task)
    read_results(out)
    read(3, "kd-mrpc", "other", "mrpc")
    with pytest.raises(CheckpointError, match=r"draws 0 and 3 .* different texts of task mrpc"):
        read_results(out)


def test_a_text_that_another_version_has_written_is_the_same_text(out, tmp_path, wordpiece):
    source = tmp_path / "text.txt"

    def cached(draw, fingerprint, text):
        source.write_text(text)
        store = LocalStore(out / "draws" / str(draw) / "cache")
        shutil.rmtree(store.root, ignore_errors=True)
        given = {"tokenizer": str(wordpiece), "sequence_length": 16}
        build_corpus(store, CorpusConfig(source=[str(source)], **given), 4)
        cache = {"corpus": fingerprint, "path": store.location}
        file = out / "draws" / str(draw) / "students/mlm/run.json"
        edit(file, lambda run: run["cache"].update(cache))

    text = "the river runs\n\nthe city sleeps\n"
    cached(0, "one", text)
    cached(1, "of other bytes", text)
    read_results(out)
    cached(1, "of other bytes", f"{text}by day\n")
    with pytest.raises(CheckpointError, match=r"draws 0 and 1 .* different texts"):
        read_results(out)


# --- students, seeds, arms ------------------------------------------------------------------------


def parts(out, arm, task, seeds, students):
    """The seeds of an arm shared out among its students."""
    whole = metrics_of(out, arm, task, seeds=seeds)
    for number in range(students):
        own = whole["per_seed"][number::students]
        dev = [one["scores"][whole["metric"]] for one in own]
        best = own[dev.index(max(dev))]["seed"]
        folder = out / folder_of(arm, task)
        shutil.rmtree(folder / f"student-{number}", ignore_errors=True)
        (folder / "metrics.json").unlink(missing_ok=True)
        part = whole | {"per_seed": own, "best_seed": best, "mean": fmean(dev), "seconds": 2.0}
        write(folder / f"student-{number}" / "metrics.json", part)


def test_the_fine_tunings_of_a_student_count_once(tmp_path):
    """They are alike: an interval over all of them would be too narrow."""
    out = cycle(tmp_path, ["expert", "kd"], FEW, {}, seeds=5, students=2)
    for task in FEW:
        parts(out, "kd", task, 5, 2)
        own_head_scored(out, "kd", task)
    results = read_results(out)

    def by_student(arm, task="cola"):
        return [fmean(score(arm, task, s) for s in range(j, 5, 2)) for j in range(2)]

    for arm in ("expert", "kd"):
        one = results.main[arm, "cola"]
        assert (one.seeds, one.scores) == ([0, 1], pytest.approx(by_student(arm)))
        both = zip(by_student(arm), by_student(arm, "mrpc"), strict=True)
        assert results.main[arm, MEAN].scores == pytest.approx([fmean(one) for one in both])
    assert results.main["expert (selected)", "cola"].scores == [
        score("expert", "cola", results.experts[0].seed)
    ]
    one = one_difference(results, "kd", "expert", "cola")
    test = stats.ttest_rel(by_student("kd"), by_student("expert"))
    assert (one.n, one.p) == (2, pytest.approx(test.pvalue))
    assert (one.low, one.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert results.costs["fine-tuned/kd/cola"] == 4.0
    (told,) = [note for note in results.notes if "2 students of every kind" in note]
    assert "which share 5 fine-tunings" in told
    page = cycle_html(out, (), results)
    assert "A dot for each student" in page
    assert "the mean over students, each the mean of its fine-tunings, " in page
    assert "mean ± standard deviation over students" in as_text(results, 300)
    assert CycleResults.from_dict(results.as_dict()) == results
    path = out / folder_of("kd", "cola") / "student-1"
    edit(path / "metrics.json", lambda m: m["config"].update(batch_size=8))
    with pytest.raises(
        CheckpointError, match=r"student-0 and .*student-1 cannot be compared: batch"
    ):
        read_results(out)
    shutil.rmtree(path)
    assert "kd on cola" in read_results(out).notes[0]


def test_own_heads_stand_behind_their_arms_and_in_no_family_of_theirs(results, made):
    names = list(dict.fromkeys(one.arm for one in results.scores))
    assert names[names.index("kd") + 1] == own_head("kd")
    for task in FEW:
        expected = [score("kd", task, 0, draw) + own_head_gain(draw) for draw in range(DRAWS)]
        assert results.main[own_head("kd"), task].scores == pytest.approx(expected)
    assert not any("own head" in one.arm + one.against for one in results.differences)
    table = next(t for t in tables_of(results) if "test scores" in t.title)
    assert own_head("kd") in [row[0] for row in rows_of(table)]
    assert CycleResults.from_dict(results.as_dict()) == results


@pytest.mark.parametrize("against", ["expert", "longer", "kd"])
def test_own_heads_against_base_longer_and_themselves_fine_tuned_again(results, against):
    """Paired by draw; Holm over the three arms that have one on all places, here one of three."""
    ones = results.own_head_differences
    family = {one.task: one for one in ones if one.against == against}
    assert [*family] == [*FEW, MEAN]
    assert {one.arm for one in ones} == {own_head("kd")}

    def by_draw(arm, task):
        return [fmean(score(arm, task, s, d) for s in range(SEEDS)) for d in range(DRAWS)]

    for task in FEW:
        own = [score("kd", task, 0, draw) + own_head_gain(draw) for draw in range(DRAWS)]
        test = stats.ttest_rel(own, by_draw(against, task))
        assert (family[task].n, family[task].p) == (DRAWS, pytest.approx(test.pvalue))
        assert family[task].mean == pytest.approx(fmean(own) - fmean(by_draw(against, task)))
    adjusted = holm([one.p for one in family.values()], missing=6)
    assert [one.p_adjusted for one in family.values()] == adjusted
    (table,) = own_head_tables(results)
    mean = f"{100 * family[MEAN].mean:+.2f}"
    assert (own_head("kd"), against, mean) in [row[:3] for row in rows_of(table)]
    assert len(rows_of(table)) == 3


def test_where_a_second_fine_tuning_loses_what_the_own_head_knows_a_note_says_so(results, out):
    (told,) = [note for note in results.notes if "their own heads" in note]
    (one,) = [row for row in rows_of(*own_head_tables(results)) if row[1] == "kd"]
    assert f"labels, on the mean over tasks (kd {one[2]} ({one[3]}), in points)" in told
    for draw, task in product(range(DRAWS), FEW):

        def fall(metrics):
            for run in metrics["per_seed"]:
                run["test_scores"]["f1"] = run["test_scores"]["matthews"] = 0.1

        edit(out / "draws" / str(draw) / own_head_folder("kd", task) / "metrics.json", fall)
    assert not any("their own heads" in note for note in read_results(out).notes)


def test_own_heads_are_not_paired_with_seeds_of_fine_tuning(tmp_path):
    """They have one score for all of them."""
    out = cycle(tmp_path, ["expert", "longer", "kd"], ["cola"], {}, seeds=2)
    own_head_scored(out, "kd", "cola")
    assert own_head("kd") in {one.arm for one in read_results(out).scores}
    assert not read_results(out).own_head_differences


def test_more_seeds_of_the_experts_alone(tmp_path):
    """By those in common: the others have no more."""
    out = cycle(tmp_path, ["expert", "mlm"], ["cola"], {}, seeds=2, experts={"seeds": 3})
    with pytest.raises(CheckpointError, match=r"2 seeds, but cycle\.json says 3"):
        read_results(out)
    finetuned(out, "expert", "cola", seeds=3)
    results = read_results(out)
    assert results.main["expert", "cola"].seeds == [0, 1, 2]
    first, second = ([score(a, "cola", s) for s in range(2)] for a in ("expert", "mlm"))
    (one,) = results.differences
    assert (one.n, one.p) == (2, pytest.approx(stats.ttest_rel(second, first).pvalue))


def test_where_experts_are_of_another_model_the_students_model_is_to_be_beaten(tmp_path):
    arms = ["expert", "start", "mlm", "pseudo", "kd"]
    settings = {"experts": {"model": "small", "finetune": {"epochs": 9}}}
    out = cycle(tmp_path, arms, ["cola"], {}, **settings)
    finetuned(out, "expert", "cola", config={"epochs": 9})
    results = read_results(out)
    told = [(one.arm, one.against) for one in results.differences]
    assert told == [
        *((arm, "expert") for arm in arms[1:]),
        *((arm, "start") for arm in ("mlm", "pseudo", "kd")),
        *(("kd", "mlm"), ("kd", "pseudo")),
    ]
    assert "start on cola" in results.verdict
    assert any("with its own budget" in note for note in results.notes)
    assert "arm expert: small, fine-tuned: the teacher" in as_text(results, 300)
    finetuned(out, "mlm", "cola", config={"epochs": 9})
    with pytest.raises(CheckpointError, match="epochs is 3 in the first, 9 in the second"):
        read_results(out)


# --- costs ----------------------------------------------------------------------------------------


def test_what_an_arm_costs_is_the_sum_of_all_that_it_needs(made, results):
    """The recorded seconds of every stage that the arm needs, no other, each once."""
    draw = read_results(made / "draws" / "1")
    experts = [f"experts/{task}" for task in FEW] + [f"search/expert/{task}" for task in FEW]
    own = [f"{kind}/kd/{task}" for kind, task in product(("search", "fine-tuned"), FEW)]
    needed = {
        "expert": experts,
        "mlm": ["students/mlm", *(part.replace("kd", "mlm") for part in own)],
        "kd": [*experts, *own, *(f"{k}{task}" for k in ("cache/", "students/kd-") for task in FEW)],
    }
    told = {one.arm: one for one in draw.arm_costs}
    for arm, stages in needed.items():
        assert told[arm].seconds == pytest.approx(sum(draw.costs[stage] for stage in stages))
        assert sum(told[arm].by_kind.values()) == pytest.approx(told[arm].seconds)
        assert told[arm].unknown == []
    assert told["committee"].by_kind["caching"] == 2.0 * SEEDS * len(FEW)
    whole = {one.arm: one for one in results.arm_costs}
    each = [read_results(made / "draws" / str(draw)) for draw in range(DRAWS)]
    kds = [one.seconds for found in each for one in found.arm_costs if one.arm == "kd"]
    assert len({*kds}) == DRAWS
    assert whole["kd"].seconds == pytest.approx(fmean(kds))
    assert results.costs["draws/3/students/kd-cola"] == 53.0
    table = next(t for t in tables_of(results) if t.title.startswith("seconds of all that an arm"))
    assert "Shared" in table.note
    assert f"experts (kd, {own_head('kd')}, committee)" in table.note
    assert "it needs no search and no fine-tuning" in table.note
    by_hand = {
        *experts,
        *(f"{kind}{task}" for kind in ("cache/", "students/kd-", "distilled/kd/") for task in FEW),
    }
    own = told[own_head("kd")]
    assert own.seconds == pytest.approx(sum(draw.costs[stage] for stage in by_hand))
    assert own.by_kind["scoring"] == 1.5 * len(FEW)  # as recorded
    assert "fine-tuning" not in own.by_kind
    rows = [row[0] for row in rows_of(table)]
    assert rows[rows.index("kd") + 1] == own_head("kd")
    assert own_head("committee") not in rows  # is not scored


def test_what_is_not_recorded_is_named_and_in_no_sum(out):
    edit(out / "draws/0/students/kd-cola/run.json", lambda r: r["cache"]["teacher_seconds"].clear())
    edit(out / "draws/0/students/kd-cola/summary.json", lambda s: s.update(seconds=None))
    results = read_results(out / "draws/0")
    (kd,) = [one for one in results.arm_costs if one.arm == "kd"]
    assert kd.unknown == ["students/kd-cola"]
    table = next(t for t in tables_of(results) if t.title.startswith("seconds of all that an arm"))
    assert "Not recorded, and in no sum: kd: students/kd-cola" in table.note


# --- page and text --------------------------------------------------------------------------------


def test_page_and_text_begin_with_the_primary_comparison(results, made, page):
    heads = [
        page.index(f">{title}<")
        for title in ("Primary comparison", "In short", "Scores (secondary)")
    ]
    assert heads == sorted(heads)
    assert "said before" in page
    assert "A dot for each draw" in page
    text = printed(made, results)
    assert text.index("primary comparison, named") < text.index("secondary: test scores")
    assert max(map(len, as_text(results, 80).splitlines())) <= 80
    assert rows_of(tables_of(results)[2])[0][1] == "cola"  # by task on the page alone
    assert "cola" not in text[text.index("secondary: differences") : text.index("search over")]
    for told in (page, " ".join(text.split())):
        assert (
            "over 4 draws of the labels; the score of a draw is the mean of 2 fine-tunings" in told
        )


def test_compare_shows_the_scores_of_a_cycle_whose_draws_have_corpora_of_their_own(
    made, results, page, command, tmp_path
):
    code, told, _ = command("compare", made, "--out", tmp_path / "page.html")
    assert (code, told.strip()) == (0, printed(made, results).strip())
    assert (tmp_path / "page.html").read_text() == page
    code, told, _ = command("compare", made, "--json")
    assert CycleResults.from_dict(json.loads(told)) == results


def test_a_gain_is_told_by_a_test_and_by_nothing_else(tmp_path):
    for sign, word in ((1, "beats"), (-1, "is worse than")):
        named = {"primary": {"arm": "kd", "against": ["expert"]}}
        out = drawn(tmp_path / word, ["expert", "kd"], ["cola"], {}, 1, 3, **named)
        for draw in range(3):

            def gain(metrics, more=sign * (0.05 + 0.001 * draw), draw=draw):
                for run in metrics["per_seed"]:
                    run["test_scores"] = scores_of("cola", score("expert", "cola", 0, draw) + more)

            edit(out / "draws" / str(draw) / folder_of("kd", "cola") / "metrics.json", gain)
        told = read_results(out).verdict
        assert told.startswith(f"kd {word} expert on cola (primary comparison)")
    for draw, (arm, scored) in product(range(3), (("kd", 0.75), ("expert", 0.5))):

        def same(metrics, scored=scored):
            for run in metrics["per_seed"]:
                run["test_scores"] = scores_of("cola", scored)

        edit(out / "draws" / str(draw) / folder_of(arm, "cola") / "metrics.json", same)
    told = read_results(out).verdict
    assert told.startswith("kd is not told apart from expert")
    assert "points (higher in 3 of 3 draws), the same every time, so that no test can" in told
    for draw in (0, 2):
        (out / f"draws/{draw}/results.json").unlink()
    told = read_results(out).verdict
    assert told.startswith("kd is not told apart from expert")
    assert told.endswith("one draw says nothing of chance")


def test_texts_of_a_test_that_models_could_learn_are_counted(tmp_path):
    out = cycle(tmp_path, ["expert", "kd"], FEW, {})

    def notes(text, where="costs/corpus", keep=False, **rows):
        write(out / where / "held.json", text | {"removed": not keep})
        how = {"test_texts": "keep" if keep else "remove"}
        edit(out / "cycle.json", lambda v: v["tasks"]["cola"].update(held=rows))
        edit(out / "cycle.json", lambda v: v.setdefault("settings", {}).update(how))
        about = ("test text", "row of its test")
        return [note for note in read_results(out).notes if any(word in note for word in about)]

    text, labels = notes({"exact": 3, "near": 2}, train=1, dev=0)
    assert text.endswith(
        "5 records of the unlabelled text with a test text (3 as it stands, 2 nearly): left out"
    )
    assert labels.endswith("rows of cola that are a row of its test: 1 of train, left out")
    edit(out / "cycle.json", lambda v: v["settings"].update(corpus={"without": ["more.txt"]}))
    text = notes({"exact": 3, "near": 2})[0]
    assert "with a test text or a text of corpus.without (3 as it stands, 2 nearly)" in text
    text, labels = notes({"exact": 1, "near": 0}, keep=True, dev=1)
    assert text.endswith("kept (test_texts: keep), and students read them")
    assert labels.endswith("1 of dev, kept (test_texts: keep)")
    (text,) = notes({"exact": 0, "near": 0})
    assert text == "no record of the unlabelled text holds a test text, or nearly"
    (text,) = notes({"exact": None, "near": None})
    assert text.endswith("were not counted: it was gone")
    (out / "costs/corpus/held.json").unlink()
    (text,) = notes({"exact": 0, "near": 1}, "costs/texts/cola/corpus")
    assert text.startswith("1 record of the text of cola")
