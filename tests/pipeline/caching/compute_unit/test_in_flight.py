"""Stage 1 beside a device: what came of a batch is taken while the next runs; nothing else waits.

A stand-in for a GPU on a CPU: results lie where they are until they are read, so that whatever
would be written over, or asked for too early, shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.pipeline.caching import compute_unit, sampling, scoring
from rekindle.pipeline.caching import teachers as teachers_module
from rekindle.pipeline.caching.batching import padded_inputs, run_batches
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.caching.in_flight import NoTransfer, Pending, Transfer
from rekindle.train.host.known import values_of
from rekindle.train.model.files import Placement
from testlib.caches import examples
from testlib.estimators import teachers_of
from testlib.killing import contents
from testlib.models import AUTO
from testlib.vocabularies.dialogues import write_rows

STANDS_IN = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
KINDS = ["topk", "threshold", "random", "hidden", "dense"]
BATCH_TOKENS = 60  # of 5 sequences of up to 24


class Device(Transfer):
    """Notes what is asked of it, by the number of the batch."""

    max_in_flight = 2

    def __init__(self) -> None:
        self.send = NoTransfer().send
        self.events: list[tuple[str, int]] = []
        self.batch = -1

    def fetch(self, found: Any, finish: Any) -> Pending:
        batch = self.batch

        def read() -> Any:
            if self.events[-1] != ("read", batch):
                self.events.append(("read", batch))
            return finish({name: values.numpy().copy() for name, values in found.items()})

        return read


class Waiting(TorchDispatchMode):
    """Refuses what makes a host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, indices = func.overloadpacket.__name__, args[1] if len(args) > 1 else ()
        masks = [i for i in indices if isinstance(i, Tensor) and i.dtype == torch.bool] if (
            name in ("index", "index_put", "index_put_")
        ) else []  # fmt: skip
        assert name not in self.WAITS
        assert not masks
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting_refused(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the host waits")

    with patch.context() as inner, Waiting():
        for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__"):
            inner.setattr(Tensor, name, refuse)
        yield


@pytest.fixture(autouse=True)
def _not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would load every model once more."""
    monkeypatch.setattr("rekindle.pipeline.caching.cache_teachers.rehearse", lambda *_: None)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Device]:
    """on_device() -> what stands in for a GPU, for teachers that are loaded from then on."""

    def begin() -> Device:
        found = Device()
        monkeypatch.setattr(teachers_module, "transfer_to", lambda name: found)
        for module in (scoring, sampling):
            monkeypatch.setattr(module, "_may_read", lambda values: False)

        def watched(teacher: Any, lengths: Any, forward: Callable[[Any], Pending]) -> Any:
            def of_batch(rows: Any) -> Pending:
                found.batch += 1
                found.events.append(("asked", found.batch))
                with waiting_refused(monkeypatch):
                    return forward(rows)

            return run_batches(teacher, lengths, of_batch)

        monkeypatch.setattr(compute_unit, "run_batches", watched)
        return found

    return begin


@pytest.fixture
def language_models(make_model, wordpiece) -> list[dict[str, Any]]:
    """A teacher of every kind of target, which share their passes."""
    model = make_model("bert", AUTO["masked_lm"], wordpiece, 3)
    made = teachers_of(model, "masked_lm", KINDS)
    return [teacher | {"batch_tokens": BATCH_TOKENS} for teacher in made]


@pytest.fixture
def experts(make_model, wordpiece) -> list[dict[str, Any]]:
    given = [
        ("AutoModelForSequenceClassification", "sequence_classification", {"passes": 3}),
        ("AutoModelForTokenClassification", "token_classification", {"passes": 0}),
    ]
    return [
        {"name": task, "task": task, "batch_tokens": BATCH_TOKENS, "monte_carlo": carlo}
        | {"model": str(make_model("bert", auto, wordpiece))}
        for auto, task, carlo in given
    ]


@STANDS_IN
def test_bytes_and_order_are_those_of_a_host_that_waits(
    tmp_path, configure, language_models, experts, on_device
):
    teachers = [*language_models, *experts]
    cache_teachers(configure(tmp_path / "waits", teachers))
    device = on_device()
    cache_teachers(configure(tmp_path / "beside", teachers))
    assert contents(tmp_path / "beside") == contents(tmp_path / "waits")
    reads = [number for what, number in device.events if what == "read"]
    assert reads == [*range(device.batch + 1)]
    flying = most = behind = 0
    for what, _ in device.events:
        flying += 1 if what == "asked" else -1
        most = max(most, flying)
        behind += what == "read" and flying > 0  # something runs while it is taken
    assert most == 3  # two of a unit, and the first of the next
    models = 1 + len(experts)
    assert behind == device.batch + 1 - models  # all but the last of each model


@STANDS_IN
@pytest.mark.parametrize("packing", ["document", "packed"])
@pytest.mark.parametrize(("family", "extra"), [("gpt2", {}), ("mistral", {"sliding_window": 8})])
def test_nor_is_a_causal_teacher_waited_for(
    tmp_path, configure, make_model, bytelevel, on_device, family, extra, packing
):
    """In full batches, in padded ones, and in rows of several documents."""
    model = make_model(family, AUTO["causal_lm"], bytelevel, **extra)
    teacher = {"name": "t", "task": "causal_lm", "model": str(model)} | {"batch_tokens": 60}
    texts = [{"text": " ".join(["the old river runs"] * count)} for count in (1, 3, 1, 9, 2, 6, 2)]
    source = str(write_rows(tmp_path / "texts.jsonl", texts))
    corpus = {"tokenizer": str(bytelevel), "packing": packing, "source": source}
    corpus |= {"domain_field": None, "limit_sequences": None}
    device, full = on_device(), set()

    def noting(teacher: Any, sequences: list[Any]) -> dict[str, Tensor]:
        inputs = padded_inputs(teacher, sequences)
        known = values_of(inputs["attention_mask"])
        full.add(known is not None and bool(known.all()))
        return inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_unit, "padded_inputs", noting)
        cache_teachers(configure(tmp_path / packing, [teacher], corpus))
    assert full == {True, False}
    assert device.batch > 1


@STANDS_IN
def test_a_batch_that_does_not_fit_leaves_the_others_be(
    tmp_path, configure, language_models, on_device, monkeypatch
):
    """Found out when it is asked for, or when it is taken."""
    teachers = [language_models[0] | {"batch_tokens": 2 * BATCH_TOKENS}]
    cache_teachers(configure(tmp_path / "plenty", teachers))
    on_device()
    failed: list[int] = []
    fetch = Device.fetch

    def failing(self: Device, found: Any, finish: Any) -> Pending:
        if self.batch == 0:
            failed.append(0)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        pending = fetch(self, found, finish)

        def read() -> Any:
            if failed == [0]:
                failed.append(1)
                raise MemoryError
            return pending()

        return read

    monkeypatch.setattr(Device, "fetch", failing)
    cache_teachers(configure(tmp_path / "little", teachers))
    assert failed == [0, 1]
    made = (examples(Cache.open(tmp_path / name)) for name in ("plenty", "little"))
    for one, other in zip(*made, strict=True):
        pairs = [*zip(one.targets["topk"], other.targets["topk"], strict=True)]
        assert pairs
        for each, again in pairs:
            np.testing.assert_array_equal(each.positions, again.positions)
            np.testing.assert_allclose(each.entropy, again.entropy, atol=2e-3)


@STANDS_IN
@pytest.mark.parametrize("number", [0, 5])
def test_numbers_that_are_none_are_told_when_they_come(
    tmp_path, configure, language_models, experts, on_device, monkeypatch, number
):
    teacher = [*language_models, *experts][number]
    on_device()
    load = teachers_module.load_model

    def broken(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        with torch.no_grad():
            bias = model.classifier.bias if number else model.cls.predictions.bias
            bias[1] = torch.nan
        return model

    monkeypatch.setattr(teachers_module, "load_model", broken)
    with pytest.raises(InputError, match=rf"'{teacher['name']}' produced logits that are .*fp32"):
        cache_teachers(configure(tmp_path, [teacher]))
    assert not (tmp_path / "targets").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_waited_for_by_nothing_else(
    tmp_path, configure, language_models, experts, monkeypatch
):
    """PyTorch refuses whatever would make the host wait while a batch is given to the device."""
    teachers = [each | {"precision": "fp32"} for each in (*language_models, *experts)]
    with monkeypatch.context() as patch:
        patch.setattr(
            teachers_module, "place", lambda name: Placement(device="cpu", precision=name)
        )
        cache_teachers(configure(tmp_path / "cpu", teachers))

    def watched(teacher: Any, lengths: Any, forward: Callable[[Any], Pending]) -> Any:
        def of_batch(rows: Any) -> Pending:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return forward(rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run_batches(teacher, lengths, of_batch)

    monkeypatch.setattr(compute_unit, "run_batches", watched)
    cache_teachers(configure(tmp_path / "gpu", teachers))
    made = (examples(Cache.open(tmp_path / name)) for name in ("cpu", "gpu"))
    for one, other in zip(*made, strict=True):
        assert one.targets.keys() == other.targets.keys()
        for each, again in zip(one.targets["topk"], other.targets["topk"], strict=True):
            np.testing.assert_array_equal(each.positions, again.positions)
            np.testing.assert_allclose(each.entropy, again.entropy, atol=1e-2)
