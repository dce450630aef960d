"""A fine-tuning of several seeds that is interrupted goes on at the seed it was in."""

import errno
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.job_functions import FineTuning, search
from rekindle.pipeline.processes.jobs import Report
from rekindle.train.export.card import CARD_FILE
from rekindle.train.finetune import run as module
from rekindle.train.finetune import seeds as seeds_module
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.result import SeedResult, seed_folder
from rekindle.train.finetune.run import finetune
from rekindle.train.finetune.seeds import FinishedSeeds, describe_tuning
from rekindle.train.interrupts import Interrupted
from rekindle.train.model.files import Placement

SEEDS = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Train and dev of a task of two classes."""
    home, found = tmp_path_factory.mktemp("task"), []
    for name, count in (("train", 24), ("dev", 12)):
        rows = [
            {"text": f"the {('river', 'engine')[n % 2]} a {n}", "label": n % 2}
            for n in range(count)
        ]
        found.append(str(home / f"{name}.jsonl"))
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture(scope="module")
def bert(make_model, wordpiece):
    return str(make_model("bert", "AutoModelForMaskedLM", wordpiece, initializer_range=0.1))


def tune(bert, files, out, seeds=SEEDS, **settings):
    quick = {"epochs": 1, "batch_size": 12, "learning_rate": 1e-2}
    config = FinetuneConfig(**quick | settings)
    return finetune(bert, *files, str(out), seeds=seeds, config=config)


def ending_in_seed(monkeypatch, number, error):
    """The ``number``-th seed from here on ends with ``error``; returns which were begun."""
    begun, real = [], module._run_seed

    def run_seed(job, seed, progress):
        begun.append(seed)
        if len(begun) == number:
            raise error
        return real(job, seed, progress)

    monkeypatch.setattr(module, "_run_seed", run_seed)
    return begun


def found_in(out):
    """Weights, predictions, and what metrics.json says but for the seconds."""
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["seconds"]
    for one in metrics["per_seed"]:
        del one["seconds"]
    weights = {k: v.tolist() for k, v in load_file(out / "model.safetensors").items()}
    return metrics, weights, (out / "predictions.jsonl").read_text()


def test_it_goes_on_at_the_seed_it_was_in(bert, files, tmp_path, monkeypatch):
    whole, home = tmp_path / "whole", tmp_path / "home"
    tune(bert, files, whole)
    home.mkdir()
    for number, told in ((2, "1 seed (0)"), (2, "2 seeds (0, 1)")):
        with monkeypatch.context() as patch:
            ending_in_seed(patch, number, KeyboardInterrupt())
            with pytest.raises(Interrupted) as caught:
                tune(bert, files, home / "out")
        assert caught.value.message == f"; {told} of 3 finished, and kept"
        assert [path.name for path in home.iterdir()] == [".out.seeds"]
    with pytest.raises(CheckpointError) as refused:
        tune(bert, files, home / "out", learning_rate=1e-3)
    for word in ("settings.learning_rate: 0.01 there, 0.001 here", "2 seeds (0, 1)", "`rm -r "):
        assert word in str(refused.value)
    begun = ending_in_seed(monkeypatch, 9, KeyboardInterrupt())
    tune(bert, files, home / "out")
    assert begun == [2]
    assert found_in(home / "out") == found_in(whole)
    assert [path.name for path in home.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("number", "error", "kept"),
    [
        (1, KeyboardInterrupt(), False),
        (1, InputError("training diverged"), False),
        (2, MemoryError(), True),
        (2, OSError(errno.ENOSPC, "No space left on device"), True),
    ],
)
def test_what_is_kept_is_told(bert, files, tmp_path, monkeypatch, number, error, kept):
    home = tmp_path / "home"
    ending_in_seed(monkeypatch, number, error)
    with pytest.raises((Interrupted, InputError)) as caught:
        tune(bert, files, home / "out")
    told = getattr(caught.value, "told", str(caught.value))
    assert ("1 seed (0) of 3 finished, and kept" in told) == kept
    assert [path.name for path in home.iterdir()] == ([".out.seeds"] if kept else [])
    if isinstance(caught.value, Interrupted):
        assert not caught.value.is_saved


def done(seed, accuracy):
    return SeedResult(seed, {"accuracy": accuracy}, None, [], 1.0)


def left(out, about, planned, scores, error=None, every=False):
    """Finish seeds with these scores, also as their weights, then end with ``error``; which were
    missing before.
    """
    seeds = FinishedSeeds(out, range(planned), "accuracy", every)
    with pytest.raises(type(error)) if error else nullcontext(), seeds.lock(about):
        missing = list(seeds.missing())
        for seed, accuracy in scores.items():
            seeds.add(
                done(seed, accuracy), lambda made, a=accuracy: (made / "weights").write_text(str(a))
            )
        if error:
            raise error
        seeds.publish(out, lambda made, place, results: None)
    return missing


KEPT = {0: 0.5, 1: 0.9, 2: 0.6}
KEPT_OF_TWO = {0: 0.5, 1: 0.9}


def test_where_every_model_is_kept_those_that_are_not_there_are_done_again(tmp_path):
    """Begun with the best one's alone, which is there, and the other way about."""
    out, stop = tmp_path / "out", KeyboardInterrupt()
    left(out, {"rate": 1}, 4, KEPT, stop)
    assert left(out, {"rate": 1}, 4, {0: 0.5}, stop, every=True) == [0, 2, 3]
    assert left(out, {"rate": 1}, 4, {2: 0.6, 3: 0.1}, stop, every=True) == [2, 3]
    assert left(out, {"rate": 1}, 4, {}, stop) == []
    assert left(out, {"rate": 1}, 4, {}, every=True) == []
    assert sorted(path.name for path in (out / "seeds").iterdir()) == [
        *(f"seed-{n}" for n in range(4))
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_weights_are_those_of_the_scores_though_what_is_kept_changes(tmp_path):
    """On a GPU a seed that is done again has another score."""
    out, stop = tmp_path / "out", KeyboardInterrupt()
    left(out, {"rate": 1}, 2, {0: 0.5, 1: 0.6}, stop)
    assert left(out, {"rate": 1}, 2, {0: 0.8}, stop, every=True) == [0]
    assert left(out, {"rate": 1}, 2, {}, stop) == []
    assert left(out, {"rate": 1}, 3, {2: 0.9}, stop) == [2]
    assert left(out, {"rate": 1}, 3, {0: 0.7, 1: 0.5}, stop, every=True) == [0, 1]
    assert left(out, {"rate": 1}, 2, {}) == []
    assert (out / "weights").read_text() == "0.7"


@pytest.mark.parametrize("twice", [False, True])
def test_a_model_that_an_older_version_kept_is_taken_up_unless_there_are_two(tmp_path, twice):
    out, stop = tmp_path / "out", KeyboardInterrupt()
    left(out, {"rate": 1}, 2, KEPT_OF_TWO, stop)
    model = tmp_path / ".out.seeds" / "model-1"
    older = shutil.copytree(model, model.with_name("best-1"))
    if not twice:
        shutil.rmtree(model)
    assert left(out, {"rate": 1}, 2, KEPT_OF_TWO if twice else {}) == [0, 1] * twice
    assert (out / "weights").read_text() == "0.9"
    assert not older.exists()


def test_every_seeds_model_is_an_experts_folder_and_a_kill_costs_none(
    bert, files, tmp_path, monkeypatch
):
    """Killed in its second seed, and then while the result is put together."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    config = FinetuneConfig(epochs=1, batch_size=12, learning_rate=1e-2)
    given = {"seeds": 2, "first_seed": 1, "seed_stride": 2, "config": config}
    with monkeypatch.context() as patch:
        ending_in_seed(patch, 2, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            finetune(bert, *files, str(out), **given, keep_every=True)
    begun = ending_in_seed(monkeypatch, 9, KeyboardInterrupt())
    with monkeypatch.context() as patch:
        patch.setattr(seeds_module, "seed_folder", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(bert, *files, str(out), **given, keep_every=True)
    assert not out.exists()
    finetune(bert, *files, str(out), **given, keep_every=True)
    assert begun == [3]
    best = json.loads((out / "metrics.json").read_text())["best_seed"]
    for seed in (1, 3):
        finetune(bert, *files, str(alone), first_seed=seed, config=config, force=True)
        assert found_in(seed_folder(out, seed)) == found_in(alone)
        weights = [load_file(f / "model.safetensors") for f in (out, alone)]
        same = all((weights[0][name] == weights[1][name]).all() for name in weights[0])
        assert same == (seed == best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_every_seeds_card_names_its_own_folder(bert, files, tmp_path, seeds):
    """With one seed too: its folder has the same model as the result, but is another one."""
    out, config = tmp_path / "out", FinetuneConfig(epochs=1, batch_size=12)
    finetune(bert, *files, str(out), seeds=seeds, config=config, keep_every=True)
    for folder in (out, *(seed_folder(out, seed) for seed in range(seeds))):
        assert f'model="{folder}")' in (folder / CARD_FILE).read_text()


def test_an_error_keeps_what_is_finished_and_says_so(tmp_path, caplog):
    out = tmp_path / "out"
    left(out, {"rate": 1}, 4, KEPT, InputError("training diverged"))
    assert "3 seeds (0, 1, 2) of 4 finished, and kept for these settings" in caplog.text
    assert left(out, {"rate": 1}, 3, {}) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fewer_seeds_take_what_is_planned_and_leave_the_others(tmp_path, caplog):
    """The best of the fewer has lost its model to a better one: it alone is done again."""
    caplog.set_level("INFO", "rekindle")
    out, stop = tmp_path / "out", KeyboardInterrupt()
    left(out, {"rate": 1}, 5, KEPT, stop)
    assert left(out, {"rate": 1}, 1, {}, stop) == [0]
    assert "2 seeds (1, 2) finished before, not asked for now" in caplog.text
    assert "1 seed (0) finished before, repeated for the model" in caplog.text
    left(out, {"rate": 1}, 1, {0: 0.5}, stop)
    assert left(out, {"rate": 1}, 1, {}, stop) == []
    assert left(out, {"rate": 1}, 5, {}, stop) == [3, 4]
    assert left(out, {"rate": 1}, 2, {}) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fewer_seeds_of_other_settings_are_refused_too(tmp_path):
    out = tmp_path / "out"
    left(out, {"rate": 1}, 5, KEPT, KeyboardInterrupt())
    with pytest.raises(CheckpointError, match=r"rate: 1 there, 2 here.*3 seeds \(0, 1, 2\)"):
        left(out, {"rate": 2}, 1, {})
    (tmp_path / ".out.seeds" / "about.json").unlink()
    with pytest.raises(CheckpointError, match=r"about.json is missing.*rm -r "):
        left(out, {"rate": 1}, 1, {})
    assert (tmp_path / ".out.seeds" / "model-1").is_dir()


def test_seeds_of_an_older_version_go_on_with_the_adamw_that_it_had(tmp_path):
    out, then = tmp_path / "out", {"rate": 1}
    now = then | {"betas": (0.9, 0.999), "eps": 1e-8}
    now |= {"group_field": None, "loss": "listwise", "grade_temperature": 1.0}  # of rankings
    now |= {"evaluate_every": 1}
    left(out, {"settings": then}, 2, {0: 0.5}, KeyboardInterrupt())
    with pytest.raises(CheckpointError, match=r"settings\.eps: 1e-08 there, 1e-06 here"):
        left(out, {"settings": now | {"eps": 1e-6}}, 2, {})
    assert left(out, {"settings": now}, 2, {1: 0.6}) == [1]


def test_adamw_has_the_betas_and_eps_of_the_settings(bert, files, tmp_path, monkeypatch):
    def stop(parameters, *rates, **options):
        raise InputError(f"{rates} {options}")

    monkeypatch.setattr(module, "adamw", stop)
    with pytest.raises(InputError, match=r"\(0.01, 0.01\) {'betas': \(0.5, 0.9\), 'eps': 1e-06}"):
        tune(bert, files, tmp_path / "out", betas=(0.5, 0.9), eps=1e-6)


def test_another_tokenizer_device_or_precision_is_something_else(bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    here = Placement(device="cuda:0", precision="bf16")
    first = describe_tuning(str(folder), {}, {}, here)
    assert first == describe_tuning(bert, {}, {}, Placement(device="cuda:1", precision="bf16"))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    short = about | {"model_max_length": 7}  # the vocabulary stays
    (folder / "tokenizer_config.json").write_text(json.dumps(short))
    there = describe_tuning(str(folder), {}, {}, Placement(device="cpu", precision="fp32"))
    assert {key for key in first if first[key] != there[key]} == {
        *("tokenizer", "device", "precision")
    }


def test_a_point_of_a_search_goes_on_too(bert, files, tmp_path, monkeypatch):
    """Of its seeds the scores alone are left; it is finished only then."""
    folder = Path(files[0]).parent
    point = FineTuning(Path(bert), folder, tmp_path / "rate=0.01", range(SEEDS))
    config = FinetuneConfig(epochs=1, batch_size=12, learning_rate=1e-2)
    with monkeypatch.context() as patch:
        ending_in_seed(patch, 2, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            search(point, config, Report())
    assert not (point.out / "metrics.json").exists()
    begun = ending_in_seed(monkeypatch, 9, KeyboardInterrupt())
    search(point, config, Report())
    assert begun == [1, 2]
    assert [path.name for path in point.out.iterdir()] == ["metrics.json"]
