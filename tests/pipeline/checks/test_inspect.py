"""What inspect shows of a cache is what is in it, as text and as JSON that any parser reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rekindle.data.cache import Cache
from rekindle.data.corpus.pieces import PieceTexts
from rekindle.data.errors import CacheFormatError, InputError
from rekindle.data.storage.seal import seal
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.inspect import inspect_cache, inspect_example


def strict(text: str) -> Any:
    """JSON as the standard has it: Infinity and NaN are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, configure, make_teacher) -> Path:
    path = tmp_path_factory.mktemp("inspected") / "cache"
    few, whole = {"kind": "topk", "k": 2}, {"kind": "topk", "k": 9999}
    three = {"config": {"num_labels": 3}}
    passes = {"monte_carlo": {"passes": 2}, "domains": ["even"]}
    teachers = [
        make_teacher("lm", "masked_lm", targets={"kind": "topk", "k": 16}),
        make_teacher("odd", "masked_lm", targets=few, domains=["odd"]),
        make_teacher("dense", "causal_lm", targets={"kind": "dense"}),
        make_teacher("whole", "causal_lm", targets=whole),
        make_teacher("classes", "sequence_classification", **three, **passes),
        make_teacher("score", "regression"),
        make_teacher("words", "token_classification", **three),
    ]
    cache_teachers(configure(path, teachers))
    return path


def test_the_summary_is_what_is_in_the_cache(cache):
    facts = strict(inspect_cache(str(cache), as_json=True))
    opened = Cache.open(cache)
    examples = [opened.example(index) for index in range(len(opened))]
    corpus = facts["corpus"]
    assert corpus["sequences"] == 12
    assert corpus["tokens"] == sum(len(e.input_ids) for e in examples)
    assert corpus["domains"] == {
        name: sum(e.domain == name for e in examples) for name in ("even", "odd")
    }
    assert corpus["complete"] is True
    assert corpus["padding"]["shuffled"] >= corpus["padding"]["similar_lengths"] >= 1
    assert list(corpus["views"].values()) == [2]
    folder = cache / "targets"
    for name, teacher in facts["teachers"].items():
        size = sum(file.stat().st_size for file in (folder / name).rglob("*.arrow"))
        assert teacher["bytes"] == size
        assert teacher["coverage"] == 1.0
        found = [target for e in examples for target in e.targets[name]]
        counts = [len(t.positions) if hasattr(t, "positions") else 1 for t in found]
        assert teacher["positions"] == sum(counts)
        assert teacher["bytes_per_position"] == pytest.approx(size / sum(counts))
        replicas = 2 if name in ("lm", "odd") else 1
        assert teacher["bytes_per_token"] == pytest.approx(size / corpus["tokens"] / replicas)


def test_the_histograms_are_of_what_is_in_the_cache(cache):
    facts = strict(inspect_cache(str(cache), as_json=True))["teachers"]
    opened = Cache.open(cache)
    examples = [opened.example(index) for index in range(len(opened))]
    for name in ("lm", "odd", "dense", "whole"):
        targets = [e.targets[name][0] for e in examples]  # the first replica is sampled
        entropy = np.concatenate([t.entropy for t in targets])
        assert facts[name]["entropy"]["mean"] == pytest.approx(entropy.mean(), abs=1e-3)
        assert facts[name]["entropy"]["p50"] == pytest.approx(np.quantile(entropy, 0.5), abs=1e-3)
        assert sum(facts[name]["entropy"]["histogram"]) == len(entropy)
    for name in ("lm", "odd"):
        kept = np.concatenate([np.exp(e.targets[name][0].log_probs).sum(1) for e in examples])
        assert facts[name]["kept_mass"]["mean"] == pytest.approx(kept.mean(), abs=1e-4)
        assert sum(facts[name]["kept_mass"]["histogram"]) == len(kept)
    assert facts["whole"]["kept_mass"]["mean"] == 1.0
    assert "kept_mass" not in facts["dense"]
    assert "entropy" not in facts["classes"]


def test_the_summary_as_text(cache):
    text = inspect_cache(str(cache))
    assert text.startswith(f"{cache}: 12 sequences (")
    for word in ("masked_lm", "top 16", "dense", "sequence 3", "token 3", "100.0%", "2 maskings"):
        assert word in text
    for name in ("lm", "odd", "whole"):
        assert f"{name} kept mass" in text
        assert f"{name} entropy" in text


def test_one_teacher_alone(cache):
    facts = strict(inspect_cache(str(cache), "words", as_json=True))
    assert list(facts["teachers"]) == ["words"]
    assert "dense" not in inspect_cache(str(cache), "words")
    example = strict(inspect_example(str(cache), 0, "words", as_json=True))
    assert list(example["targets"]) == ["words"]


@pytest.mark.parametrize("index", [0, 6, 11])
def test_an_example_as_json(cache, index):
    """Everything of it; the log tail of a distribution that is kept whole (−inf) is null."""
    shown = strict(inspect_example(str(cache), index, None, as_json=True))
    example = Cache.open(cache).example(index)
    assert shown["digest"] == example.digest
    assert shown["text"] == example.text
    assert shown["input_ids"] == example.input_ids.tolist()
    for name, targets in example.targets.items():
        assert len(shown["targets"][name]) == len(targets)
        for found, target in zip(shown["targets"][name], targets, strict=True):
            assert found.keys() == vars(target).keys()
            for key, value in vars(target).items():
                if isinstance(value, np.ndarray):
                    assert len(found[key]) == len(value)
                    if value.size:
                        np.testing.assert_allclose(np.array(found[key]), value)
    (whole,) = shown["targets"]["whole"]
    assert whole["log_tail"]["1.0"] == [None] * (len(example.input_ids) - 1)
    lm = shown["targets"]["lm"][0]
    assert all(tail < 0 for tail in lm["log_tail"]["2.0"])


def test_an_example_as_text(cache):
    opened = Cache.open(cache)
    example = opened.example(3)
    text = inspect_example(str(cache), 3, None)
    assert example.digest in text
    assert example.text in text
    target = example.targets["lm"][1]
    token = PieceTexts(opened.corpus.tokenizer.hf)[int(target.ids[0, 0])]
    assert f"{token} {np.exp(target.log_probs[0, 0]):.3f}" in text
    assert "lm, masking 1" in text
    assert f"score: score {example.targets['score'][0].logits[0]:.3f}" in text


def test_class_probabilities_as_text(cache):
    opened = Cache.open(cache)
    index = next(i for i in range(12) if opened.example(i).targets["classes"])
    logits = opened.example(index).targets["classes"][0].logits.astype(np.float64)
    probs = np.exp(logits) / np.exp(logits).sum()
    expected = ", ".join(f"LABEL_{i} {probs[i]:.3f}" for i in np.argsort(-probs))
    assert f"classes: {expected}" in inspect_example(str(cache), index, "classes")


@pytest.mark.parametrize("index", [-1, 12, 10**12])
def test_an_example_that_is_not_there(cache, index):
    with pytest.raises(InputError, match=rf"the examples 0\.\.11, not {index}"):
        inspect_example(str(cache), index, None)


def test_a_teacher_that_is_not_there(cache):
    for call in (
        lambda: inspect_cache(str(cache), "ml"),
        lambda: inspect_example(str(cache), 0, "ml"),
    ):
        with pytest.raises(InputError, match=r"no teacher 'ml' .*lm"):
            call()


def test_what_is_no_cache(tmp_path):
    with pytest.raises(CacheFormatError, match="not a Rekindle cache"):
        inspect_cache(str(tmp_path))


def test_a_cache_in_the_making(tmp_path, configure, cache):
    """A corpus without teachers, and a teacher without a finished shard."""
    cache_teachers(configure(tmp_path / "c", []))
    facts = strict(inspect_cache(str(tmp_path / "c"), as_json=True))
    assert facts["teachers"] == {}
    folder = tmp_path / "c" / "targets" / "lm"
    folder.mkdir(parents=True)
    description = json.loads((cache / "targets" / "dense" / "teacher.json").read_text())
    del description["record"]
    (folder / "teacher.json").write_bytes(seal(description | {"name": "lm"}))
    facts = strict(inspect_cache(str(tmp_path / "c"), as_json=True))
    assert facts["teachers"]["lm"]["coverage"] == 0.0
    assert "0.0%" in inspect_cache(str(tmp_path / "c"))
    assert "lm" in strict(inspect_example(str(tmp_path / "c"), 0, None, as_json=True))["targets"]


def test_brackets_are_text(tmp_path, configure):
    """What looks like the markup of the table printer is part of a text, a domain, a path."""
    source = tmp_path / "docs.jsonl"
    document = {"text": "A [bold]river[/bold] [MASK] runs [/] over.", "domain": "[red]"}
    source.write_text(json.dumps(document) + "\n")
    path = tmp_path / "[i]cache"
    corpus = {"source": [str(source)], "sequence_length": 64}
    cache_teachers(configure(path, [], corpus=corpus))
    assert inspect_cache(str(path)).startswith(f"{path}: 1 sequence (")
    assert "domains: [red] 1" in inspect_cache(str(path))
    assert document["text"] in inspect_example(str(path), 0, None)


def test_the_size_of_hidden_states_is_that_with_their_output_matrix(
    tmp_path, configure, make_teacher
):
    teacher = make_teacher("states", "masked_lm", targets={"kind": "hidden"})
    cache_teachers(configure(tmp_path / "c", [teacher]))
    files = [p for p in (tmp_path / "c/targets/states").rglob("*") if p.suffix != ".json"]
    size = sum(path.stat().st_size for path in files if path.is_file())
    facts = strict(inspect_cache(str(tmp_path / "c"), as_json=True))["teachers"]["states"]
    assert facts["bytes"] == size
    assert f"{size / 1e6:.2f}" in inspect_cache(str(tmp_path / "c")).split()
