"""A teacher shared out among processes: what is refused, and what an error leaves."""

import os
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from rekindle.data.errors import InputError, RekindleError
from rekindle.pipeline.caching import make_unit, model_parallel
from rekindle.pipeline.caching.model_parallel import (
    check_processes,
    from_pretrained_kwargs,
    in_step,
    send_message,
)
from rekindle.pipeline.exits import errors_as_exit_codes
from rekindle.train.model.fitting import AUTO_CLASSES
from testlib.several.forked import forked_world


def test_what_went_wrong_is_said_though_the_others_have_ended(one_thread):
    """No traceback of the process group hides it."""
    teachers = [SimpleNamespace(tp_plan="auto")]

    def work():
        with in_step(teachers) as follows:
            if follows:
                os._exit(0)
            with pytest.raises(RekindleError, match="another process of this run has ended"):
                told_again_and_again()
            raise InputError("the disk is full")

    def told_again_and_again():
        for _ in range(300):
            send_message("of a unit")
            time.sleep(0.1)

    main, other = forked_world(lambda: run_as_command(work))
    assert other.wait(100) == 0
    assert main.wait(100) == 2, main.errors
    assert main.errors == "error: the disk is full\n"


@pytest.mark.parametrize("alike", [True, False])
def test_what_all_find_is_said_once(one_thread, alike):
    teachers = [SimpleNamespace(tp_plan="auto")]

    def work():
        with in_step(teachers) as follows:
            raise InputError("no plan" if alike or follows else "another error")

    found = [(c.wait(100), c.errors) for c in forked_world(lambda: run_as_command(work))]
    assert [code for code, _ in found] == [2, 2]
    assert [bool(said) for _, said in found] == [True, not alike]


def run_as_command(work):
    with errors_as_exit_codes():
        work()


class _Runner:
    """A runner of a model; ``there`` are those whose model is in memory."""

    there: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    most = 0

    def __init__(self, plans, corpus):
        self.there.add(self)
        _Runner.most = max(_Runner.most, len(self.there))


def test_a_model_goes_before_the_next_one_comes(tmp_path, monkeypatch):
    """Also where another process leads: each may fill its device."""
    messages = iter([((), str(tmp_path)), ((), str(tmp_path)), None])
    monkeypatch.setattr(make_unit, "receive_message", lambda: next(messages))
    monkeypatch.setattr(make_unit, "Corpus", lambda store: None)
    monkeypatch.setattr(make_unit, "UnitRunner", _Runner)
    make_unit.follow()
    assert _Runner.most == 1


def test_one_process_alone_is_told_how_to_start_several(configure, tmp_path, make_teacher):
    one = configure(tmp_path, [make_teacher("lm", "causal_lm", tp_plan="auto")]).teachers
    with pytest.raises(InputError, match=r"'lm': tp_plan .* torchrun --nproc-per-node 2 --no-py"):
        check_processes(one)
    with pytest.raises(InputError, match="Leave --workers and --executor out"):
        check_processes(one, in_this_process=False)


def test_a_family_without_a_plan_is_refused(configure, tmp_path, make_teacher, monkeypatch):
    monkeypatch.setattr(model_parallel, "find_spec", lambda name: name)
    config = configure(tmp_path, [make_teacher("bert", "masked_lm", tp_plan="auto")]).teachers[0]
    with pytest.raises(
        InputError, match=r"no tensor-parallel plan for BertForMaskedLM. .* device_ma"
    ):
        from_pretrained_kwargs(config, Path(config.model), AUTO_CLASSES["masked_lm"])


@pytest.mark.parametrize("key", ["device_map", "tp_plan"])
def test_without_accelerate_it_is_asked_for(configure, tmp_path, make_teacher, monkeypatch, key):
    monkeypatch.setattr(model_parallel, "find_spec", lambda name: None)
    config = configure(tmp_path, [make_teacher("lm", "causal_lm", **{key: "auto"})]).teachers[0]
    with pytest.raises(InputError, match=rf"{key} auto needs the package accelerate"):
        from_pretrained_kwargs(config, Path(config.model), AUTO_CLASSES["causal_lm"])
