"""Answers come in the order of the questions; after an error nothing more is asked."""

import threading

import pytest

from rekindle.pipeline.served.in_threads import ANSWERS_AHEAD, ask_in_order


def test_the_last_may_be_answered_first():
    """Each of three threads waits for the next question's answer."""
    done = [threading.Event() for _ in range(3)] + [threading.Event()]
    done[3].set()

    def answer(number: int) -> int:
        assert done[number + 1].wait(30)
        done[number].set()
        return number

    assert list(ask_in_order(answer, range(3), 3)) == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_at_a_time_and_not_far_ahead(threads):
    at_once, most, taken = [0], [0], []
    lock = threading.Lock()

    def questions():
        for number in range(50):
            taken.append(number)
            yield number

    def answer(number: int) -> int:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        with lock:
            at_once[0] -= 1
        return number

    for number in ask_in_order(answer, questions(), threads):
        assert len(taken) <= number + 2 + ANSWERS_AHEAD * threads
    assert number == 49
    assert most[0] <= threads


def test_an_error_ends_it():
    asked, stopped, found = [], [], []

    def answer(number: int) -> int:
        asked.append(number)
        if number == 2:
            raise ValueError(number)
        return number

    with pytest.raises(ValueError, match="2"):
        found.extend(ask_in_order(answer, range(9), 1, lambda: stopped.append(1)))
    assert (found, asked, stopped) == ([0, 1], [0, 1, 2], [1])
