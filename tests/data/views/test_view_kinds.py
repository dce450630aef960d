"""What all kinds of views have in common, found by the names that a cache records."""

from typing import get_args

import pytest

from rekindle.data.targets.schema import Task, TeacherInfo
from rekindle.data.views.base import StoredView, View
from rekindle.data.views.pairs import PairKind, PairView
from rekindle.data.views.registry import VIEWS, view_kind

RECORDED = {
    "clean": {"masked_lm", "causal_lm"},
    "text": {"sequence_classification", "regression", "token_classification", "embedding"},
    "masked-0123456789ab": {"masked_lm"},
    "pairs-same-document-0123456789ab": {"sequence_classification", "regression"},
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_name_finds_its_kind_and_who_may_be_shown_it(name):
    info = TeacherInfo(name="t", task="masked_lm", kind="topk", view=name)
    assert info.view_class is view_kind(name)
    assert name.startswith(info.view_class.kind)
    assert set(info.view_class.tasks) == RECORDED[name]


def test_every_kind_is_registered_and_recorded():
    assert {view_kind(name) for name in RECORDED} == {*VIEWS.values()}
    assert {task for view in VIEWS.values() for task in view.tasks} == {*get_args(Task)}
    assert all("-" not in name and name == view.kind for name, view in VIEWS.items())


@pytest.mark.parametrize("view", VIEWS.values())
def test_what_is_stored_has_columns_beside_the_digests(view):
    names = [field.name for field in view.fields]
    assert view.stored == issubclass(view, StoredView) == bool(names)
    if view.stored:
        assert names[0] == "digest"
        assert {"input_ids", view.list_column} <= set(names)
    assert not (view.masked and view.paired)


@pytest.mark.parametrize("view", VIEWS.values())
def test_replicas_have_numbers_where_there_can_be_several(view):
    assert view.numbers(3) == ([0, 1, 2] if view.masked else [None])
    assert view.unit(7, 2) == ("00007-r002" if view.masked else "00007")


@pytest.mark.parametrize("name", ["", "x", "maskedx", "pairs", "../../x"])
def test_nobody_may_be_shown_a_view_of_another_name(name):
    assert view_kind(name) is (PairView if name == "pairs" else View)
    assert not View.tasks
    assert not View.stored


@pytest.mark.parametrize("kind", get_args(PairKind))
def test_the_name_of_a_pair_view_says_the_kind_of_pairs(kind):
    assert PairView.pairs_of(f"pairs-{kind}-0123456789ab") == kind
