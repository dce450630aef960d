"""Files of every kind, each changed at random in one place: a command takes what it reads, with the
right result, or refuses it in one message that names the place, with nothing half-written.

A case follows from its subject and number, which a failure tells; alone it is run by
``REKINDLE_ONE_PLACE=17 pytest -m slow -k "many_changes and chat" tests/pipeline/fuzz``.
"""

import os

import pytest

from testlib.one_place.judged import Case, Judge
from testlib.one_place.rights import right
from testlib.one_place.subjects import SUBJECTS
from testlib.one_place.world import make_world

# Of a few commands: each is run once more, to know what is right.
QUICK = {"run file": 8, "cycle file": 6, "labels": 6, "tokens": 6, "cache": 8, "metrics": 2}
QUICK |= {"expert's config": 6, "tokenizer": 4, "generation": 2, "safetensors": 6, "chat": 3}
QUICK |= {"signed cache": 8}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(make_world(tmp_path_factory.mktemp("world"), SUBJECTS), right)


def check(judge, cases):
    """Fail with all finds, of each what was changed and what was said."""
    finds = {(case.subject, case.number): judge.judge(case) for case in cases}
    wrong = [f"{case}: " + "\n  ".join(told) for case, told in finds.items() if told[0]]
    assert not wrong, "\n".join(wrong)


def test_some_changes_are_taken_rightly_or_refused_by_name(tmp_path):
    cases = [Case(name, number) for name, count in QUICK.items() for number in range(count)]
    check(Judge(make_world(tmp_path, QUICK), right), cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_many_changes_are_taken_rightly_or_refused_by_name(judge, name):
    one = os.environ.get("REKINDLE_ONE_PLACE")
    numbers = range(SUBJECTS[name].share) if one is None else [int(one)]
    check(judge, [Case(name, number) for number in numbers])
