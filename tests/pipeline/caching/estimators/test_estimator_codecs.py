"""The codecs beside each other: values, bytes, and the same bytes whatever the batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.pipeline.caching import make_unit
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.checks.audit import audit_cache
from testlib.caches import committed
from testlib.estimators import (
    CODECS,
    CODED,
    FAMILY,
    SAMPLES,
    TARGETS,
    TASKS,
    teachers_of,
    whole_batch,
)
from testlib.models import AUTO


@pytest.mark.parametrize("name", CODED)
def test_compact_decodes_to_the_default_columns(world, name):
    default, compact = (world.open(codec).teachers[name] for codec in ("default", "compact"))
    corpus, seen = world.open().corpus, 0
    for shard, commit in enumerate(corpus.commits):
        for replica in range(default.replicas) if default.masked else [None]:
            for row in range(commit.rows):
                one, a, b = default.cut((shard, row), replica)
                other, c, d = compact.cut((shard, row), replica)
                assert one.columns.keys() == other.columns.keys()
                for column, values in one.columns.items():
                    same = other.columns[column]
                    assert values.dtype == same.dtype
                    assert np.array_equal(values[a:b], same[c:d]), column
                seen += b - a
    assert seen == default.positions == compact.positions


@pytest.mark.parametrize("name", CODED)
def test_all_codecs_keep_the_same_ids(world, name):
    """The same draws, too: they depend on the teacher's name and seed, not on how values lie."""
    tau = TARGETS[name].get("temperatures", [1.0])[0]
    ids = [whole_batch(world.open(codec), name).decode(tau)[0] for codec in CODECS]
    assert np.array_equal(ids[0], ids[1])
    assert np.array_equal(ids[0], ids[2])


def stored_bytes(folder: Path, name: str) -> int:
    return sum(p.stat().st_size for p in (folder / "targets" / name / "data").iterdir())


@pytest.mark.parametrize("task", TASKS)
def test_compact_is_smaller_than_default_and_default_than_precise(
    tmp_path, configure, make_model, wordpiece, task
):
    model = make_model(FAMILY[task], AUTO[task], wordpiece, seed=4, initializer_range=0.15)
    sizes = {}
    for codec in CODECS:
        teachers = [
            {
                "name": kind,
                "model": str(model),
                "task": task,
                "targets": {"kind": kind, "k": 100, "codec": codec},
            }
            for kind in ("topk", "threshold")
        ]
        long = {"sequence_length": 64, "limit_sequences": 64}
        config = configure(
            tmp_path / codec, teachers, corpus=long, cache={"sequences_per_shard": 64}
        )
        cache_teachers(config)
        sizes[codec] = {t["name"]: stored_bytes(tmp_path / codec, t["name"]) for t in teachers}
    for kind in ("topk", "threshold"):
        assert sizes["compact"][kind] < sizes["default"][kind] < sizes["precise"][kind]
        per_value = sizes["precise"][kind] - sizes["default"][kind]
        positions = Cache.open(tmp_path / "default").teachers[kind].positions
        # A byte more per value, two less per position for the smallest log-probability.
        assert 0.95 * 98 * positions < per_value < 1.1 * 98 * positions


# --- the same whatever the batch, and after a resume ----------------------------------------------


@pytest.fixture(scope="module")
def lookup(tmp_path_factory, wordpiece) -> Path:
    """A Llama that looks its answer up by the current token: a product with one term in each sum
    rounds alike in every batch, so that what is left to differ is ours.
    """
    from rekindle.data.corpus.tokenizer import load_tokenizer

    path = tmp_path_factory.mktemp("lookup")
    loaded = load_tokenizer(str(wordpiece))
    width = 4 * -(-loaded.size // 4)
    config = transformers.LlamaConfig(
        vocab_size=loaded.size,
        hidden_size=width,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=loaded.pad_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(width)[: loaded.size])
        model.lm_head.weight.normal_(std=0.15)
    model.save_pretrained(path)
    loaded.save(str(path))
    return path


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_bytes_with_any_batch_and_after_a_resume(
    tmp_path, configure, lookup, codec, monkeypatch
):
    names = list(TARGETS) if codec == "default" else CODED
    teachers = teachers_of(lookup, "causal_lm", names, codec)
    found = {}
    for tokens in (1, 60, 4096) if codec == "default" else (60, 4096):
        given = [teacher | {"batch_tokens": tokens} for teacher in teachers]
        config = configure(tmp_path / str(tokens), given)
        if tokens == 60:
            original, calls = make_unit.run_unit, []

            def failing(*arguments: Any, _run: Any = original, _calls: list = calls, **options):
                _calls.append(arguments)
                if len(_calls) % 2:
                    raise KeyboardInterrupt
                return _run(*arguments, **options)

            with monkeypatch.context() as patch:
                patch.setattr(make_unit, "run_unit", failing)
                interrupted = 0
                while True:
                    try:
                        cache_teachers(config)
                    except KeyboardInterrupt:
                        interrupted += 1
                        continue
                    break
            assert interrupted >= 3  # once before each unit of the pass that they share
        else:
            cache_teachers(config)
        found[tokens] = committed(tmp_path / str(tokens), "targets")
    assert len(found[60]) == 3 * len(names)
    assert all(one == found[60] for one in found.values())


def test_a_batchs_rounding_hardly_moves_a_draw(tmp_path, configure, make_model, wordpiece):
    """Of a real model: its logits differ by float32 noise from batch to batch."""
    model = make_model("bert", AUTO["masked_lm"], wordpiece, seed=4, initializer_range=0.15)
    caches = []
    for tokens in (24, 4096):
        teachers = teachers_of(model, "masked_lm", list(SAMPLES))
        given = [teacher | {"batch_tokens": tokens} for teacher in teachers]
        cache_teachers(configure(tmp_path / str(tokens), given))
        caches.append(Cache.open(tmp_path / str(tokens)))
    for name, tau in SAMPLES.items():
        one, other = (np.sort(whole_batch(c, name).decode(tau)[0], axis=1) for c in caches)
        assert len(one) > 80
        assert (one != other).any(axis=1).mean() <= 0.02, name


# --- the audit ------------------------------------------------------------------------------------


def test_the_audit_agrees_with_every_kind(world):
    found = audit_cache(str(world.folders["default"]), world.config, 24).values
    assert found.keys() == TARGETS.keys()
    for name, values in found.items():
        assert values["rows"] > 100
        if name in SAMPLES or name == "whole":
            assert values["total_variation"] <= 0.02, name
            continue
        assert abs(values["kl"]) < 5e-3, name
        assert values["top1"] > 0.99, name
    assert found["random"]["total_variation"] < 1e-3
    assert found["random-2"]["total_variation"] < 1e-3
    assert found["dense"]["kl"] < 1e-6
    assert found["hidden"]["kl"] < 1e-4
    for name in ("dense", "every"):
        assert found[name]["kept_mass"] == pytest.approx(1, abs=1e-5)
    assert 0.2 < found["topk"]["kept_mass"] < 1


@pytest.mark.covering
@pytest.mark.parametrize("codec", ["precise", "compact"])
def test_the_audit_agrees_with_every_codec(world, configure, codec):
    teachers = teachers_of(world.model, world.task, CODED, codec)
    config = configure(
        world.folders[codec],
        teachers,
        corpus={"limit_sequences": 24},
        cache={"sequences_per_shard": 10},
    )
    found = audit_cache(str(world.folders[codec]), config, 10).values
    bound = {"precise": 1e-5, "compact": 5e-3}[codec]
    for name in ("topk", "every"):
        assert abs(found[name]["kl"]) < bound
    variation = {"precise": 2e-3, "compact": 0.02}[codec]
    for name in ("threshold", "threshold-2", "whole"):
        assert found[name]["total_variation"] <= variation, name
