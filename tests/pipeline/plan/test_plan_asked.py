"""A plan for a corpus that is not there: of so many texts or tokens, or beside another's cache."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig, dump_config
from rekindle.pipeline.plan.run import plan_run
from rekindle.pipeline.plan.scale import Scale
from rekindle.pipeline.plan.text import format_plan
from rekindle.pipeline.train_student import describe_result, train_from_config

TEXTS = [f"the old river runs over city {n} and " * (1 + n % 4) for n in range(30)]


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def tree(path: Path) -> dict[str, int]:
    """When each file and folder below was changed."""
    return {str(p): p.stat().st_mtime_ns for p in [path, *path.rglob("*")]}


def test_so_many_texts_cost_what_they_then_do(tmp_path, configure, teachers):
    """Ten times the sample is planned as ten times as many texts turn out, whatever the limit."""
    corpus = {"source": lines(tmp_path / "few.jsonl", TEXTS), "domain_field": None}
    where = {"sequences_per_shard": 64}
    small = configure(tmp_path / "a", teachers[:2], corpus=corpus, cache=where)
    for scale in (Scale(texts=300), Scale(tokens=10 * 30 * 16)):
        found = plan_run(small, probe=False, scale=scale)
        assert found.corpus.estimated
        assert "scaled from 30 texts of the source (few" in found.corpus.basis
    found = plan_run(small, probe=False, scale=Scale(texts=300))
    whole = corpus | {"source": lines(tmp_path / "all.jsonl", TEXTS * 10), "limit_sequences": None}
    large = configure(tmp_path / "b", teachers[:2], corpus=whole, cache=where)
    cache_teachers(large)
    real = Cache.open(tmp_path / "b")
    assert (found.corpus.texts, found.corpus.sequences) == (300, len(real))
    assert found.corpus.tokens == real.corpus.tokens
    for work in found.teachers:
        made = real.teachers[work.name]
        assert work.units_to_make == len(made.commits)
        assert work.bytes == pytest.approx(made.bytes, rel=0.15)
    again = plan_run(small, probe=False, scale=Scale(tokens=real.corpus.tokens)).corpus
    assert (again.texts, again.sequences) == (300, len(real))
    assert "300 texts" in " ".join(format_plan(found).split())  # wrapped where the path ends


def test_beside_a_cache_of_another_corpus_a_new_one_is_planned(tmp_path, configure, teachers):
    cache_teachers(configure(tmp_path / "cache", teachers[:1]))
    before = tree(tmp_path)
    for corpus in ({"limit_sequences": 7}, {"sequence_length": 32, "limit_sequences": None}):
        fresh = plan_run(configure(tmp_path / "none", teachers[:1], corpus), probe=False)
        found = plan_run(configure(tmp_path / "cache", teachers[:1], corpus), probe=False)
        assert (found.corpus, found.views, found.teachers) == (
            *(fresh.corpus, fresh.views, fresh.teachers),
        )
        (told,) = found.warnings
        assert "the figures are for a new cache" in told
        assert f"{next(iter(corpus))}: " in told
        assert "has 12 sequences" in told
        assert "teachers: lm" in told
    config = configure(tmp_path / "cache", teachers[:1])
    told = plan_run(config, probe=False, scale=Scale(texts=10**7)).warnings[0]
    assert "what is there is not counted" in told
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["--texts", "--tokens"])
def test_the_command_answers_and_leaves_no_trace(
    tmp_path, configure, teachers, command, monkeypatch, option
):
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home" / "models"))
    monkeypatch.chdir(tmp_path / "work")
    corpus = {"source": lines(tmp_path / "few.jsonl", TEXTS), "domain_field": None}
    config = configure(Path("runs/cache"), teachers[3:4], corpus=corpus)
    Path("run.yaml").write_text(dump_config(config))
    before = tree(tmp_path)
    code, said, errors = command("plan", "run.yaml", option, "1e9", "--json")
    assert code == 0, errors
    corpus = json.loads(said)["corpus"]
    assert corpus["texts" if option == "--texts" else "tokens"] == 10**9
    assert json.loads(said)["teachers"][0]["seconds"] > 100
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("texts", "tokens", "told"),
    [
        ("5B", None, "'5B'.*write 5000000000$"),
        ("1M", None, "write 1000000$"),
        ("1.5k", None, "write 1500$"),
        ("1,000,000", None, "write 1000000$"),
        ("1,5", None, "as in 10000000 or 1e7$"),
        (None, "0", "'0'.*as in 10000000 or 1e7$"),
        ("1.5", None, "--texts"),
        ("1", "1", "give one"),
    ],
)
def test_what_is_no_number_is_told(texts, tokens, told):
    with pytest.raises(InputError, match=told):
        Scale.from_options(texts, tokens)
    assert Scale.from_options("10_000", None) == Scale(texts=10_000)
    assert Scale.from_options(None, "5e9") == Scale(tokens=5 * 10**9)
    assert Scale.from_options(None, None) is None


def test_what_will_teach_nothing_or_repeat_is_told_before(tmp_path, configure, teachers, caplog):
    """A pair expert on texts of one sentence, and batches larger than the corpus."""
    source = lines(tmp_path / "a.jsonl", ["what is the old river", "where is the city"])
    corpus = {"source": source, "domain_field": None}
    values = configure(tmp_path / "c", teachers[5:6], corpus).model_dump(mode="json", by_alias=True)
    values |= {"student": {"model": teachers[0]["model"]}, "train": {"batch_sequences": 3}}
    config = parse_settings(RunConfig, values)
    warnings = " ".join(plan_run(config, probe=False).warnings)
    cache_teachers(config)
    for told in (warnings, caplog.text):
        assert "pairs: adjacent: no sequence has two sentences" in told
        assert "only 2 sequences of 2 are trained on" in told
    caplog.clear()
    cache_teachers(configure(tmp_path / "d", teachers[5:6]))
    assert "no sequence has two sentences" not in caplog.text


def test_an_expert_that_finds_few_pairs_is_told_of(tmp_path, configure, teachers, caplog):
    """One text of 30 has two sentences: told when planned, when cached and when trained on, but not
    of an expert that is for the domain of that text alone.
    """
    texts = [{"text": f"the river runs over city {n}", "domain": "short"} for n in range(30)]
    texts.append({"text": "The river. The city is old.", "domain": "long"})
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(text) + "\n" for text in texts))
    corpus = {"source": str(source), "domain_field": "domain", "limit_sequences": None}
    both = [teachers[5], teachers[5] | {"name": "long", "domains": ["long"]}]
    values = configure(tmp_path / "c", both, corpus).model_dump(mode="json", by_alias=True)
    distill = [{"teachers": ["pairs", "long"]}]
    few = {"steps": 1, "batch_sequences": 2, "held_out": 0.1}
    train = few | {"objective": {"hard": {"weight": 0}, "distill": distill}}
    values |= {"student": {"model": teachers[0]["model"]}, "train": train}
    config = parse_settings(RunConfig, values)
    (planned,) = plan_run(config, probe=False).warnings
    cache_teachers(config)
    (cached,) = [m for m in caplog.messages if "have a pair" in m]
    caplog.clear()
    result = train_from_config(config, tmp_path / "out")
    (trained,) = [m for m in caplog.messages if "have a pair" in m]
    assert planned == cached == trained
    assert "teacher 'pairs', pairs: adjacent: only 3.2 % of its sequences" in trained
    assert "pairs: random, which needs no neighbours" in trained
    assert "tokens trained" not in describe_result(result)  # it has no word to predict
    told = describe_result(replace(result, evaluation={})).splitlines()[0]
    assert told.endswith(" s")
