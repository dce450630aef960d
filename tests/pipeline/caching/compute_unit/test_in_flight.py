"""Stage 1 beside a device: what came of a batch is taken while the next runs; nothing else waits.

A stand-in for a GPU on a CPU: results lie where they are until they are read, so that whatever
would be written over, or asked for too early, shows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

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
from rekindle.pipeline.caching.in_flight import (
    IN_FLIGHT_BYTES,
    Arrays,
    GpuTransfer,
    NoTransfer,
    Pending,
    TransferBeside,
)
from rekindle.train.host.known import values_of
from rekindle.train.model.files import Placement
from testlib.caches import examples
from testlib.estimators import teachers_of
from testlib.killing import contents
from testlib.models import AUTO
from testlib.vocabularies.dialogues import write_rows

STANDS_IN = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
KINDS = ["topk", "threshold", "random", "hidden", "dense"]
to_numpy = Tensor.numpy  # also where the host is refused to wait
BATCH_TOKENS = 60  # of 5 sequences of up to 24


class Device(TransferBeside):
    """Notes what is asked of it, by the number of the batch, and the most bytes in flight."""

    def __init__(self, budget: int = IN_FLIGHT_BYTES) -> None:
        super().__init__(budget)
        self.send = NoTransfer().send
        self.events: list[tuple[str, int]] = []
        self.batch, self.sizes, self.flying, self.most = -1, list[int](), 0, 0

    def begin_copy(self, found: Any) -> Callable[[], Arrays]:
        batch, size = self.batch, sum(values.nbytes for values in found.values())
        self.sizes.append(size)
        self.flying += size
        self.most = max(self.most, self.flying)

        def wait() -> Arrays:
            self.flying -= size
            if self.events[-1:] != [("read", batch)]:
                self.events.append(("read", batch))
            return {name: to_numpy(values).copy() for name, values in found.items()}

        return wait


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
    begin_copy = Device.begin_copy

    def failing(self: Device, found: Any) -> Callable[[], Arrays]:
        if self.batch == 0:
            failed.append(0)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        wait = begin_copy(self, found)

        def waiting() -> Arrays:
            if failed == [0]:
                failed.append(1)
                raise MemoryError
            return wait()

        return waiting

    monkeypatch.setattr(Device, "begin_copy", failing)
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
def test_blocks_of_whole_distributions_come_back_within_the_budget(
    tmp_path, configure, language_models, on_device, monkeypatch
):
    """One after another, while others of their batch are made; the bytes stay the same."""
    teachers = language_models[-1:]
    monkeypatch.setitem(scoring.LOGITS_BYTES, "cpu", 4000)
    cache_teachers(configure(tmp_path / "waits", teachers))
    joined = on_device()
    cache_teachers(configure(tmp_path / "joined", teachers))
    monkeypatch.setattr(scoring, "TOGETHER_BYTES", 0)
    device = on_device()
    cache_teachers(configure(tmp_path / "unbounded", teachers))
    largest = max(device.sizes)
    assert device.most > 5 * largest
    assert len(joined.sizes) == joined.batch + 1 < len(device.sizes) // 2
    bounded = on_device()
    bounded.budget = 2 * largest
    cache_teachers(configure(tmp_path / "bounded", teachers))
    assert largest < bounded.most <= bounded.budget
    for name in ("joined", "unbounded", "bounded"):
        assert contents(tmp_path / name) == contents(tmp_path / "waits")


def test_what_is_in_flight_is_bounded_in_bytes():
    """The oldest comes back for the next; a result above the budget is in flight alone; each is
    read once, in any order, and has the values it had.
    """
    device, reads = Device(budget=100), list[Pending]()
    for number, size in enumerate([40, 40, 40, 200, 10, 90]):
        device.batch = number
        reads.append(device.fetch({"x": torch.full((size,), number, dtype=torch.uint8)}, dict))
    assert [number for _, number in device.events] == [0, 1, 2, 3]
    assert (device.flying, device.most) == (100, 200)
    for number in (4, 0, 3):
        assert (reads[number]()["x"] == number).all()
    assert [number for _, number in device.events] == [0, 1, 2, 3, 4]
    assert device.drain()
    assert device.flying == 0
    assert not device.drain()
    for number in (5, 2, 1):
        assert (reads[number]()["x"] == number).all()
    with pytest.raises(AssertionError):
        reads[1]()


class Memory:
    """A device with room for so many rows, in flight or not, whose batches have the results 1."""

    def __init__(self, rows: int, in_blocks: bool = False) -> None:
        self.room, self.device, self.events = rows, Device(), list[tuple[Any, ...]]()
        self.in_blocks = in_blocks  # whether a block has been fetched of a batch that has no room
        take = self.device._take

        def taking(copy: Any) -> None:
            if copy.wait is not None:
                self.events.append(("taken",))
                self.room += copy.size
            take(copy)

        self.device._take = taking  # type: ignore[method-assign]
        drop = self.device.drop

        def dropping(fetches: range) -> None:
            before = self.device._bytes
            drop(fetches)
            self.room += before - self.device._bytes

        self.device.drop = dropping  # type: ignore[method-assign]

    def forward(self, rows: Any) -> Pending:
        self.events.append(("asked", rows.tolist()))
        assert len(self.events) < 50
        if len(rows) > self.room:
            if self.in_blocks:
                self.room -= 1
                self.device.fetch({"x": torch.ones(1, dtype=torch.uint8)}, dict)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.room -= len(rows)
        return self.device.fetch({"x": torch.ones(len(rows), dtype=torch.uint8)}, dict)

    def run(self, batch_tokens: int) -> tuple[int, list[int]]:
        """Run six rows of one token; return the budget left to batches, and the rows in their
        order.
        """
        teacher: Any = SimpleNamespace(
            info=SimpleNamespace(name="one"),
            config=SimpleNamespace(tp_plan=None),
            transfer=self.device,
            batch_tokens=batch_tokens,
            equal_lengths=False,
        )
        steps = [*run_batches(teacher, np.ones(6, np.int64), self.forward)]
        batches = [one for one in steps if not isinstance(one, bool)]
        return teacher.batch_tokens, np.concatenate([rows for rows, _ in batches]).tolist()


def test_out_of_memory_beside_others_they_come_back_and_it_is_tried_again():
    """At the same size, and from then on too."""
    memory = Memory(rows=3)
    assert memory.run(batch_tokens=2) == (2, [0, 1, 2, 3, 4, 5])
    asked = [("asked", [0, 1]), ("asked", [2, 3]), ("taken",), ("asked", [2, 3])]
    assert memory.events[:4] == asked
    assert memory.events[4:] == [("asked", [4, 5]), ("taken",), ("asked", [4, 5]), ("taken",)]


def test_out_of_memory_alone_halves_a_batch():
    """At once with nothing in flight; else after what was in flight came back, and one more try."""
    alone = Memory(rows=2)
    assert alone.run(batch_tokens=3) == (1, [0, 1, 2, 3, 4, 5])
    assert alone.events[:3] == [("asked", [0, 1, 2]), ("asked", [0]), ("asked", [1])]
    beside = Memory(rows=2)
    earlier = beside.device.fetch({"x": torch.ones(1, dtype=torch.uint8)}, dict)  # of another unit
    assert beside.run(batch_tokens=4) == (2, [0, 1, 2, 3, 4, 5])
    tried = [("asked", [0, 1, 2, 3]), ("taken",), ("asked", [0, 1, 2, 3]), ("asked", [0, 1])]
    assert beside.events[:4] == tried
    assert earlier()["x"].tolist() == [1]
    by_itself = Memory(rows=2, in_blocks=True)
    assert by_itself.run(batch_tokens=3) == (1, [0, 1, 2, 3, 4, 5])
    assert by_itself.events[:3] == [("asked", [0, 1, 2]), ("asked", [0]), ("asked", [1])]
    assert not by_itself.device.drain()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_copy_that_the_host_has_no_memory_for_is_taken_later(failures):
    """Whichever batch asked for its place, at once or by draining; that one keeps its size."""
    memory, left = Memory(rows=9), [None] * failures
    memory.device.budget = 2
    begin_copy = memory.device.begin_copy

    def failing(found: Any) -> Callable[[], Arrays]:
        wait = begin_copy(found)

        def waiting() -> Arrays:
            if left:
                left.pop()
                raise MemoryError
            return wait()

        return waiting

    memory.device.begin_copy = failing  # type: ignore[method-assign]
    assert memory.run(batch_tokens=2) == (2, [0, 1, 2, 3, 4, 5])
    asked = [event for event in memory.events if event[0] == "asked"]
    assert asked == [("asked", rows) for rows in ([0, 1], [2, 3], [2, 3], [4, 5])]


def test_a_batch_that_cannot_be_read_leaves_none_of_its_blocks():
    """Of two, the first does not fit into the host's memory."""
    memory = Memory(rows=12)
    forward, failed = memory.forward, list[int]()

    def in_two(rows: Any) -> Pending:
        first, second = forward(rows), forward(rows)

        def read() -> Any:
            if not failed:
                failed.append(len(memory.device._on_their_way))
                raise MemoryError
            first()
            return second()

        return read

    memory.forward = in_two  # type: ignore[method-assign]
    assert memory.run(batch_tokens=6) == (3, [0, 1, 2, 3, 4, 5])
    assert failed == [2]
    assert not memory.device.drain()


def test_pinned_memory_is_kept_until_all_of_it_is_copied(monkeypatch):
    """With a GPU's streams replaced."""
    empty, array, calls = torch.empty, np.array, list[Any]()
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, **_: empty(shape, dtype=dtype))
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    def failing(values: Any) -> Any:
        calls.append(values)
        if len(calls) == 2:
            raise MemoryError
        return array(values)

    pending = GpuTransfer(torch.device("cpu")).fetch({"x": torch.ones(1), "y": torch.ones(2)}, dict)
    with monkeypatch.context() as patch:
        patch.setattr(np, "array", failing)
        with pytest.raises(MemoryError):
            pending()
        assert {name: values.tolist() for name, values in pending().items()} == {
            "x": [1],
            "y": [1, 1],
        }


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_keeps_no_copy_of_what_is_on_its_way():
    transfer, before = GpuTransfer(torch.device("cuda")), torch.cuda.memory_allocated()
    pending = transfer.fetch({"x": torch.ones(1 << 20, device="cuda")}, dict)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert pending()["x"].all()
