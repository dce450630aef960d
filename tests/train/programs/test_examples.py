"""Each program of examples/ runs as it stands; the Trainer's and TRL's are in tests/extras."""

import importlib

from rekindle.data.cache import Cache
from rekindle.data.settings import parse_settings
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.loop import train_student
from testlib.pages.examples import EXAMPLES, run_example


def test_each_is_short_and_listed():
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    for path in EXAMPLES.rglob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 60
        assert f"({path.relative_to(EXAMPLES)})" in listed


def test_a_cache_is_read(masked_world, capsys):
    run_example("read_cache.py", masked_world.path, "big")
    told = capsys.readouterr().out
    assert "position" in told
    assert "hardest" in told


def test_the_loss_alone(capsys):
    run_example("loss_alone.py")
    assert "gradient [16, 1000]" in capsys.readouterr().out


def test_a_loop_of_ones_own_learns(masked_world, capsys):
    run_example("own_loop.py", masked_world.path, "big", masked_world.student, 30)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_cache_in_a_store(masked_world, s3, capsys):
    import s3fs

    place = f"{s3}/cache"
    s3fs.S3FileSystem().put(str(masked_world.path), place.removeprefix("s3://"), recursive=True)
    run_example("cache_in_a_store.py", place, "big")
    cache = masked_world.open()
    [line] = [one for one in capsys.readouterr().out.splitlines() if "positions with" in one]
    assert int(line.split()[0].replace(",", "")) > len(cache.corpus)


def test_a_method_of_ones_own_is_found_and_trains(masked_world, tmp_path, monkeypatch):
    """Installed as a package is: found by its entry point, named in a run file."""
    about = tmp_path / "sure_tokens-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sure-tokens\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text(
        "[rekindle.methods]\nsure_tokens = own_method:SureTokens\n"
    )
    for place in (tmp_path, EXAMPLES / "own_method"):
        monkeypatch.syspath_prepend(str(place))
    importlib.invalidate_caches()
    term = {"method": "sure_tokens", "teacher": "big", "sure": 0.01, "weight": 1.0}
    config = parse_settings(
        TrainConfig,
        {
            **{"steps": 4, "batch_sequences": 6, "warmup_steps": 1, "evaluate_sequences": 8},
            "objective": {"methods": [term]},
        },
    )
    seen = []
    train_student(
        Cache.open(masked_world.path),
        StudentConfig(model=str(masked_world.student)),
        config,
        tmp_path / "run",
        report=lambda step, values: seen.append(values["sure_tokens/loss"]),
    )
    assert len(seen) == 4
    assert all(value > 0 for value in seen)
