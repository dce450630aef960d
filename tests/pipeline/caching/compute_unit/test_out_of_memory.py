"""A batch that does not fit is halved; other errors, and numbers that are none, are told."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.pipeline.caching import teachers as teachers_module
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from testlib.caches import examples

OUT_OF_MEMORY = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 412316860416 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError(),
}


@pytest.fixture
def small_memory(monkeypatch):
    """small_memory(tokens, error): models loaded from now on take no batch of more tokens."""
    seen: list[tuple[int, int]] = []

    def limit(tokens: int, error: BaseException) -> list[tuple[int, int]]:
        load = teachers_module.load_model

        def limited(*arguments: Any, **options: Any) -> Any:
            model = load(*arguments, **options)
            body = model.base_model if "CausalLM" in type(model).__name__ else model
            run = body.forward

            def forward(*args: Any, **inputs: Any) -> Any:
                shape = tuple(inputs["input_ids"].shape)
                seen.append(shape)
                if shape[0] * shape[1] > tokens:
                    raise error
                return run(*args, **inputs)

            body.forward = forward
            return model

        monkeypatch.setattr(teachers_module, "load_model", limited)
        return seen

    return limit


def teachers_of_all_kinds(make_model, wordpiece) -> list[dict[str, str]]:
    kinds = [
        ("bert", "AutoModelForMaskedLM", "masked_lm"),
        ("llama", "AutoModelForCausalLM", "causal_lm"),
        ("bert", "AutoModelForSequenceClassification", "sequence_classification"),
        ("bert", "AutoModelForTokenClassification", "token_classification"),
    ]
    # The precise codec: a step of the default one is wider than float32 noise that crosses it.
    precise = {"targets": {"kind": "topk", "codec": "precise"}}
    return [
        {"name": task, "model": str(make_model(family, auto, wordpiece)), "task": task}
        | (precise if task in ("masked_lm", "causal_lm") else {})
        for family, auto, task in kinds
    ]


def assert_same_ids(ids: np.ndarray, others: np.ndarray, log_probs: np.ndarray) -> None:
    """Equal but for neighbours so near each other that noise decides which comes first."""
    for row, place in zip(*np.nonzero(ids != others), strict=True):
        near = np.abs(log_probs[row] - log_probs[row, place]) < 2e-3
        assert near.sum() > 1, f"row {row}: {ids[row]} and {others[row]}"


def assert_same_targets(one: Cache, other: Cache) -> None:
    """Equal but for float32 noise (batches of another shape round otherwise)."""
    for a, b in zip(examples(one), examples(other), strict=True):
        assert a.digest == b.digest
        for name in a.targets:
            for first, second in zip(a.targets[name], b.targets[name], strict=True):
                for field, value in vars(first).items():
                    if field == "ids":
                        assert_same_ids(value, getattr(second, field), first.log_probs)
                    elif isinstance(value, np.ndarray):
                        np.testing.assert_allclose(getattr(second, field), value, atol=2e-3)


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_batch_out_of_memory_is_halved_and_the_targets_are_the_same(
    tmp_path, configure, make_model, wordpiece, small_memory, kind, caplog
):
    teachers = teachers_of_all_kinds(make_model, wordpiece)[: 4 if kind == "cuda" else 1]
    cache_teachers(configure(tmp_path / "plenty", teachers))
    seen = small_memory(60, OUT_OF_MEMORY[kind])
    with caplog.at_level("WARNING", logger="rekindle"):
        cache_teachers(configure(tmp_path / "little", teachers))
    assert_same_targets(Cache.open(tmp_path / "plenty"), Cache.open(tmp_path / "little"))
    # 5 sequences of up to 24 tokens at first; then half as many tokens, from there on and for good.
    failed = [rows * width for rows, width in seen if rows * width > 60]
    assert len(failed) == len(teachers)
    assert len([r for r in caplog.records if "out of memory" in r.getMessage()]) == len(teachers)
    # What fits into the smaller budget still runs together.
    assert max(rows for rows, width in seen if rows * width <= 60) > 1


def test_a_sequence_that_alone_does_not_fit_is_named(
    tmp_path, configure, make_model, wordpiece, small_memory
):
    teacher = teachers_of_all_kinds(make_model, wordpiece)[0]
    small_memory(10, OUT_OF_MEMORY["cuda"])
    with pytest.raises(InputError, match=r"'masked_lm': a single sequence of 24 tokens does not"):
        cache_teachers(configure(tmp_path, [teacher]))


def test_a_teacher_that_does_not_fit_is_named(
    tmp_path, configure, make_model, wordpiece, monkeypatch
):
    def no_room(*arguments: Any, **options: Any) -> None:
        raise OUT_OF_MEMORY["cuda"]

    monkeypatch.setattr(teachers_module, "load_model", no_room)
    teacher = teachers_of_all_kinds(make_model, wordpiece)[0]
    kept = "made and kept: 3 files of the corpus$"
    with pytest.raises(InputError, match=rf"^out of memory .*'masked_lm' .*precision .*{kept}"):
        cache_teachers(configure(tmp_path, [teacher]))


def test_other_errors_of_a_model_are_not_taken_for_lack_of_memory(
    tmp_path, configure, make_model, wordpiece, small_memory
):
    teacher = teachers_of_all_kinds(make_model, wordpiece)[2]
    seen = small_memory(10, RuntimeError("shape mismatch"))
    with pytest.raises(InputError, match=r"failed on a batch of 5 sequences .*: shape mismatch"):
        cache_teachers(configure(tmp_path, [teacher]))
    assert len([size for size in seen if size[0] > 1]) == 1  # others look at it as it is loaded


# --- models that say NaN --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "value"),
    [(0, np.inf), (1, np.inf), (2, np.inf), (3, np.inf)],
)
def test_logits_that_are_no_numbers_are_refused(
    tmp_path, configure, make_model, wordpiece, number, value
):
    teacher = teachers_of_all_kinds(make_model, wordpiece)[number]
    autos = ["MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification"]
    auto = getattr(transformers, f"AutoModelFor{autos[number]}")
    model = auto.from_pretrained(teacher["model"])
    with torch.no_grad():
        {
            0: lambda: model.cls.predictions.bias,
            1: lambda: model.lm_head.weight,
            2: lambda: model.classifier.bias,
            3: lambda: model.classifier.bias,
        }[number]()[1] = value
    model.save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(wordpiece))
    tokenizer.save_pretrained(tmp_path / "model")
    config = configure(tmp_path / "cache", [teacher | {"model": str(tmp_path / "model")}])
    with pytest.raises(InputError, match=rf"'{teacher['task']}' produced logits that are .*fp32"):
        cache_teachers(config)
    # Nothing of it is in the cache, and its name is free for a model that works.
    assert not (tmp_path / "cache" / "targets").exists()
    assert cache_teachers(configure(tmp_path / "cache", [teacher])).units_done >= 3
