"""Batches that threads do side by side: results in order, and no more of them than are soon due."""

import threading
from itertools import count, islice

import pytest

from rekindle.data.corpus.in_order import BATCHES_AHEAD_PER_THREAD, in_threads


def test_results_are_in_order_when_a_later_batch_is_done_first():
    second = threading.Event()

    def do(number):
        if number == 0:
            assert second.wait(60)
        if number == 1:
            second.set()
        return number

    assert list(in_threads(lambda: do, range(20), threads=2)) == list(range(20))


def test_few_batches_are_taken_for_the_first_results_and_some_for_each_thread_later():
    for wanted, most in ((1, 2), (40, 40 + BATCHES_AHEAD_PER_THREAD * 4)):
        taken = count()
        results = in_threads(lambda: abs, taken, threads=4)
        assert list(islice(results, wanted)) == list(range(wanted))
        results.close()
        assert wanted < next(taken) <= most


def test_an_error_comes_in_the_place_of_its_result():
    results = in_threads(lambda: lambda number: 1 // (3 - number), range(10), threads=3)
    assert list(islice(results, 3)) == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
