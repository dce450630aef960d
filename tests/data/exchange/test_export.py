"""What is exported is what is cached, with words beside it; imported again it is the same."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.exchange.exporting import Export
from rekindle.data.exchange.files import write_export
from rekindle.data.source.rows import read_rows
from testlib.caches import problems

LABELS = {"num_labels": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, make_teacher, make_cache):
    """A teacher of each kind that can be exported and imported again, and two that are samples or
    whole.
    """
    top = {"kind": "topk", "k": 6}
    teachers = [
        make_teacher("clm", "causal_lm", targets=top),
        make_teacher("fine", "causal_lm", targets=top | {"codec": "precise"}),
        make_teacher("mlm", "masked_lm", targets=top),
        make_teacher("classes", "sequence_classification", config=LABELS),
        make_teacher("pair", "sequence_classification", config=LABELS, pairs="adjacent"),
        make_teacher("words", "token_classification", config=LABELS),
        make_teacher("score", "regression"),
        make_teacher("sample", "causal_lm", targets={"kind": "threshold", "k": 4}),
        make_teacher("dense", "causal_lm", targets={"kind": "dense"}),
    ]
    path = tmp_path_factory.mktemp("exported") / "cache"
    make_cache(path, teachers)
    return Cache.open(path)


def settings_of(cache, name):
    info = cache.teachers[name].info
    found = {"task": info.task, "labels": info.label_names}
    return found if info.num_labels else {"task": info.task, "codec": info.codec}


def assert_same(cache, name, other):
    """Every decoded value: log-probabilities and tails to less than a codec's smallest step."""
    for index in range(len(cache)):
        targets = cache.example(index).targets
        assert len(targets[name]) == len(targets[other]) > 0
        for one, two in zip(targets[name], targets[other], strict=True):
            for key, value in vars(one).items():
                again = getattr(two, key)
                if isinstance(value, dict):
                    assert value.keys() == again.keys()
                    value, again = (np.stack([*each.values()]) for each in (value, again))
                if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    np.testing.assert_allclose(value, again, atol=2e-6, err_msg=key)
                else:
                    np.testing.assert_array_equal(value, again, err_msg=key)


@pytest.mark.covering
@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".arrow"])
@pytest.mark.parametrize("name", ["clm", "fine", "mlm", "classes", "words", "score"])
def test_what_is_exported_and_imported_again_is_the_same(cache, tmp_path, name, ending):
    path = tmp_path / f"rows{ending}"
    exported = write_export(Export(cache.corpus, cache.teacher(name)), path)
    assert exported == 12 * (2 if name == "mlm" else 1)
    other = f"{name}-{ending[1:]}"
    rows = read_rows(str(path))
    cache.import_targets(other, rows, {"model": name}, **settings_of(cache, name))
    assert_same(cache, name, other)
    if name == "clm":
        info = cache.teachers[other].info
        assert info.estimator["tail"] == "given"
        assert info.imported.lacks == ()
        assert problems(cache.store.root) == []


def test_pairs_are_those_that_there_are(cache):
    """A sequence without a pair needs no row, and may have none: a student is shown nothing of it,
    and would learn an answer to that.
    """
    info = cache.teachers["pair"].info
    settings = {"task": info.task, "labels": info.label_names, "view": info.view}
    rows = [*Export(cache.corpus, cache.teacher("pair")).rows()]
    without = min({*range(12)} - {row["index"] for row in rows})
    odd = rows[0] | {"index": without, "input_ids": None, "digest": cache.example(without).digest}
    with pytest.raises(InputError, match=f"sequence {without} has no pair of texts in"):
        cache.import_targets("odd", [odd], {"model": "pair"}, **settings)
    done = cache.import_targets("pair-again", rows, {"model": "pair"}, **settings)
    assert (done.rows, done.missing, done.units_done) == (len(rows), 0, 3)
    assert cache.teachers["pair-again"].coverage == 1
    for index in range(12):
        one, two = (cache.example(index).targets[name] for name in ("pair", "pair-again"))
        assert [target.logits.tolist() for target in one] == [t.logits.tolist() for t in two]
    with pytest.raises(InputError, match=f"without a row: {rows[3]['index']}"):
        cache.import_targets("few", rows[:3] + rows[4:], {"model": "pair"}, **settings)


def test_a_row_has_words_beside_its_numbers(cache):
    (row,) = Export(cache.corpus, cache.teacher("clm"), limit=1).rows()
    example = cache.example(0)
    assert row["text"] == example.text
    assert row["digest"] == example.digest
    assert "".join(row["tokens"][1:-1]).strip() == example.text.lower().replace(".", " .").strip()
    (target,) = example.targets["clm"]
    assert row["gold_tokens"] == row["tokens"][1:]
    shown = dict(zip(row["input_ids"], row["tokens"], strict=True))
    for ids, texts in zip(row["ids"], row["candidates"], strict=True):
        assert all(shown.get(id, text) == text for id, text in zip(ids, texts, strict=True))
    np.testing.assert_array_equal(np.stack(row["ids"]), target.ids)
    (row,) = Export(cache.corpus, cache.teacher("classes"), limit=1).rows()
    assert row["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert row["label"] == row["labels"][int(np.argmax(row["probabilities"]))]
    assert sum(row["probabilities"]) == pytest.approx(1)


@pytest.mark.parametrize("mapped", [False, True])
def test_datasets_of_hugging_face(cache, tmp_path, mapped):
    names = ["clm", "mlm", "classes", "words", "score", "sample"]
    found = cache.to_datasets(names, folder=tmp_path if mapped else None)
    assert list(found) == names
    for name, dataset in found.items():
        assert len(dataset) == 12 * (2 if name == "mlm" else 1)
        assert dataset[0]["text"] == cache.example(0).text
        want = next(Export(cache.corpus, cache.teacher(name)).rows())
        assert dataset.column_names == list(want)
    (target,) = cache.example(5).targets["clm"]
    np.testing.assert_array_equal(found["clm"][5]["ids"], target.ids)
    np.testing.assert_array_equal(np.float32(found["clm"][5]["log_probs"]), target.log_probs)


def test_a_folder_of_datasets(cache, tmp_path):
    from datasets import load_from_disk

    write_export(Export(cache.corpus, cache.teacher("clm")), tmp_path / "rows")
    found = load_from_disk(str(tmp_path / "rows"))
    assert list(found["index"]) == [*range(12)]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_samples_are_told_apart_and_not_taken_for_the_likeliest(cache):
    export = Export(cache.corpus, cache.teacher("sample"))
    row = next(export.rows())
    assert "ids" not in row
    assert len(row["sampled_ids"]) == len(row["sampled_log_probs"]) == len(row["positions"])
    with pytest.raises(InputError, match=r"row 1: it has sampled_ids.*targets.kind topk"):
        cache.import_targets("again", export.rows(), {"model": "sample"})


def test_whole_distributions_need_a_k(cache):
    with pytest.raises(InputError, match="keeps whole distributions"):
        cache.to_datasets(["dense"])
    row = next(Export(cache.corpus, cache.teacher("dense"), k=3).rows())
    batch = cache.gather(np.array([0]), ["dense"]).targets["dense"]
    ids, _, log_tail = batch.decode(1.0, 3)
    np.testing.assert_array_equal(np.stack(row["ids"]), ids)
    np.testing.assert_allclose(row["log_tail"], log_tail, atol=1e-6)


def test_the_text_alone_is_what_a_model_elsewhere_is_shown(cache, tmp_path):
    """With a masked view, each replica as it is masked, and where it has targets."""
    write_export(Export(cache.corpus), tmp_path / "text.parquet")
    rows = pq.read_table(tmp_path / "text.parquet").to_pylist()
    assert [row["input_ids"] for row in rows] == [
        cache.example(i).input_ids.tolist() for i in range(12)
    ]
    view = cache.masked_view()
    write_export(Export(cache.corpus, view=view), tmp_path / "masked.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "masked.jsonl").read_text().splitlines()]
    assert [(line["replica"], line["index"]) for line in lines] == [
        (replica, index) for replica in (0, 1) for index in range(12)
    ]
    for line in lines:
        target = cache.example(line["index"]).targets["mlm"][line["replica"]]
        assert line["positions"] == target.positions.tolist()
        assert line["shown_ids"] == target.input_ids.tolist()


def test_a_file_that_is_there_is_not_replaced_unasked(cache, tmp_path):
    export = Export(cache.corpus, limit=1)
    path = tmp_path / "rows.arrow"
    path.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        write_export(export, path)
    assert path.read_text() == "mine"
    assert write_export(export, path, force=True) == 1
    with pa.memory_map(str(path)) as file:
        assert pa.ipc.open_file(file).read_all().num_rows == 1
    with pytest.raises(InputError, match="a name without an ending"):
        write_export(export, tmp_path / "rows.csv")


def test_a_folder_that_is_no_data_set_is_never_replaced(cache, tmp_path):
    """Even when asked: ``--out`` may be somebody's home, or the cache itself."""
    export = Export(cache.corpus, limit=1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis").write_text("mine")
    (tmp_path / "rows.jsonl").mkdir()
    for out in (tmp_path / "home", cache.store.root, tmp_path / "rows.jsonl"):
        with pytest.raises(InputError, match="is left as it is"):
            write_export(export, out, force=True)
    assert (tmp_path / "home/thesis").read_text() == "mine"
    write_export(export, tmp_path / "rows")
    with pytest.raises(InputError, match="already exists"):
        write_export(export, tmp_path / "rows")
    assert write_export(Export(cache.corpus, limit=2), tmp_path / "rows", force=True) == 2
