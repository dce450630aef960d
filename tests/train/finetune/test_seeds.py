"""A fine-tuning of several seeds that is interrupted goes on at the seed it was in."""

import errno
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rekindle.data.errors import CheckpointError, InputError
from rekindle.pipeline.job_functions import FineTuning, search
from rekindle.pipeline.processes.jobs import Report
from rekindle.train.finetune import run as module
from rekindle.train.finetune.config import FinetuneConfig
from rekindle.train.finetune.run import finetune
from rekindle.train.interrupts import Interrupted

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
        assert caught.value.told == f"; {told} of 3 finished, and kept"
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
        (2, InputError("training diverged"), False),  # as it would again
        (2, MemoryError(), False),
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
        assert not caught.value.kept


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
