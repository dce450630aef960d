"""Caches from strangers: any bytes give a typed error or sound data; no crash, no hang.

Level A: bytes changed under an intact commit record must be found, or what is read is what was
written. Level B: a stranger who signs what he changed (sizes, checksums, seals) must get a typed
error, or give data within the ranges that readers check. Cases run in forked children: a crash, a
hang or a memory bomb is a failure with the name of its case, not the end of the tests. A case is
called ``template mutator seed``: ``REKINDLE_FUZZ="dense b-words 17" pytest -s -k one_case`` runs it
alone, in this process.
"""

import json
import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest

from rekindle.data.cache import Cache, write_manifest
from rekindle.data.errors import CacheError, RekindleError
from rekindle.data.storage import shards
from rekindle.data.storage.atomic import new_attempt
from rekindle.data.storage.seal import SEAL
from rekindle.data.storage.store import LocalStore
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig
from rekindle.data.views.pairs import PairView
from rekindle.pipeline.checks.verify import verify_cache
from testlib.changes.changing import change
from testlib.fuzz.cases import MUTATORS, RESIDENT, cases_of, explained, peak, run_cases
from testlib.fuzz.reading import read_everything
from testlib.fuzz.signed import batches_of
from testlib.fuzz.strangers import Stranger, sealed_record
from testlib.fuzz.templates import GOLDEN, TEACHERS, VOCABULARY_TASKS, corpus_at, write_teacher

pytestmark = pytest.mark.usefixtures("same_attempts")


@pytest.fixture(scope="module")
def same_attempts():
    """Cases are the same every time, and so are the names of the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "new_attempt", lambda: "0000face")
        yield


@pytest.fixture(scope="module")
def templates(tmp_path_factory, corpus_file, wordpiece):
    """One small cache of each kind by name; no test writes into it."""
    root = tmp_path_factory.mktemp("templates")
    corpus_at(root / "short", corpus_file, wordpiece, length=12, limit=9, per_shard=5)
    # Its domains are nulls.
    corpus_at(root / "long", corpus_file, wordpiece, None, length=8, limit=131, per_shard=140)
    made = {path.name: path for path in GOLDEN}
    for name, parts in TEACHERS.items():
        path = made[name] = root / name
        shutil.copytree(root / ("long" if name == "tall" else "short"), path)
        corpus = Cache.open(path).corpus
        view = None
        if parts[0]["task"] == "masked_lm":
            view = MaskedView(corpus, MaskConfig(probability=0.3), seed=1, replicas=2)
        elif name == "pairs":
            view = PairView(corpus, "adjacent", seed=1)
        if view is not None:
            view.build()
        size = corpus.info["tokenizer"]["size"]
        for part in parts:
            vocabulary = {"vocabulary_size": size} if part["task"] in VOCABULARY_TASKS else {}
            write_teacher(corpus, view, name="teacher", **(vocabulary | part))
        write_manifest(LocalStore(path))
    return made


def test_caches_are_sound_before_they_are_changed(templates):
    for name, path in templates.items():
        assert verify_cache(str(path)).problems == [], name
        found = read_everything(path)
        assert not {k: v for k, v in found.items() if isinstance(v, Exception)}, name
        assert found == read_everything(path), name


def test_strangers_get_typed_errors_or_give_sound_data(templates, tmp_path):
    failed = run_cases(cases_of(templates, 32), templates, tmp_path)
    assert not failed, explained(failed)


def test_a_small_file_does_not_fill_the_memory(templates, tmp_path):
    """Zeros that zstd packs 10,000 to 1: 6 kB must not become a gigabyte before it is refused."""
    shutil.copytree(templates["compact"], tmp_path / "cache")
    stranger = Stranger(tmp_path / "cache")
    path = next(p for p in stranger.data if "targets" in p.parts)
    (batch,), schema = batches_of(path)
    positions = 1_500_000
    ends = pa.array([0] + [positions] * batch.num_rows, pa.int32())
    arrays = [batch["digest"]]
    for field in list(schema)[1:]:
        width = field.type.value_type.list_size
        zeros = pa.FixedSizeListArray.from_arrays(np.zeros(positions * width, np.uint8), width)
        arrays.append(pa.ListArray.from_arrays(ends, zeros))
    bomb = pa.record_batch(arrays, schema=schema)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(bomb)
        cuts = [sink.tell()]
    content = sink.getvalue().to_pybytes()
    del bomb, arrays, zeros, batch
    body = json.loads(stranger.record_of(path).read_bytes())
    body["facts"].pop("scalars", None)
    body.pop(SEAL)
    stranger.write(stranger.record_of(path), sealed_record(body))
    stranger.commit(path, content, [*cuts, len(content)])
    assert len(content) < 20_000
    process = os.fork()
    if process == 0:
        before = peak()
        try:
            cache = Cache.open(tmp_path / "cache")
            view = cache.teacher("teacher").info.view
            with pytest.raises(CacheError):
                cache.gather(np.arange(3), ["teacher"], masked_view=view)
            os._exit(0 if peak() - before < RESIDENT else 1)
        finally:
            os._exit(2)
    assert os.waitpid(process, 0)[1] == 0


def changes_of(cache):
    """Each teacher renamed, and transcoded as far as it can be."""
    for name in sorted(path.name for path in (cache / "targets").iterdir()):
        yield from (("rename", name, "x"), ("rename", "x", name))
        yield from (("transcode", name, codec) for codec in ("compact", "default"))


@pytest.mark.parametrize("count", [6, pytest.param(400, marks=pytest.mark.slow)])
def test_teachers_of_strangers_are_changed_or_refused(templates, tmp_path, monkeypatch, count):
    """A copy that was half made has another attempt's name than what is there."""
    monkeypatch.setattr(shards, "new_attempt", new_attempt)
    refused = 0
    for template, mutator, seed in cases_of(templates, count, 70_000):
        root = tmp_path / "cache"
        shutil.copytree(templates[template], root)
        MUTATORS[mutator](Stranger(root, random.Random(f"{template} {mutator} {seed}")))
        for asked in changes_of(root):
            try:
                change(root, asked)
            except RekindleError:
                refused += 1
        shutil.rmtree(root)
    assert refused


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_strangers_get_typed_errors_or_give_sound_data(templates, tmp_path, part):
    failed = run_cases(cases_of(templates, 3_000, 10_000 * (part + 1)), templates, tmp_path)
    assert not failed, explained(failed)


@pytest.mark.skipif("REKINDLE_FUZZ" not in os.environ, reason="REKINDLE_FUZZ names no case")
def test_one_case(templates, tmp_path):
    template, mutator, seed = os.environ["REKINDLE_FUZZ"].split()
    shutil.copytree(templates[template], tmp_path / "cache")
    stranger = Stranger(tmp_path / "cache", random.Random(f"{template} {mutator} {seed}"))
    MUTATORS[mutator](stranger)
    for step, found in read_everything(tmp_path / "cache").items():
        print(f"{step}: {type(found).__name__} {found}")
