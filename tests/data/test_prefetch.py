from __future__ import annotations

import itertools
import threading
import time

import pytest

from argonne.data import DataError, Prefetcher


def test_results_come_in_order_and_all_of_them_before_the_error() -> None:
    error = DataError("row group 3 cannot be read")

    def source(numbers=itertools.count()) -> int:
        number = next(numbers)
        if number == 5:
            raise error
        return number

    with Prefetcher(source, depth=2) as prefetcher:
        assert [prefetcher.get() for _ in range(5)] == [0, 1, 2, 3, 4]
        for _ in range(2):
            with pytest.raises(DataError) as caught:
                prefetcher.get()
            assert caught.value is error


def test_an_exit_in_the_thread_reaches_the_caller() -> None:
    def source() -> int:
        raise SystemExit(3)

    with Prefetcher(source) as prefetcher, pytest.raises(SystemExit):
        prefetcher.get()


def test_no_more_than_depth_results_are_made_ahead() -> None:
    numbers = itertools.count(1)
    latest = 0

    def source() -> int:
        nonlocal latest
        latest = next(numbers)
        return latest

    with Prefetcher(source, depth=3) as prefetcher:
        for taken in range(1, 6):
            prefetcher.get()
            deadline = time.monotonic() + 5
            while latest < taken + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert latest == taken + 3


def test_close_is_prompt_with_a_full_queue_and_may_be_repeated() -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(itertools.count().__next__, depth=1)
    prefetcher.get()
    started = time.monotonic()
    prefetcher.close()
    prefetcher.close()
    assert time.monotonic() - started < 1
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.get()


def test_wait_seconds_adds_up_the_time_that_get_waited() -> None:
    def source() -> None:
        time.sleep(0.05)

    with Prefetcher(source, depth=1) as prefetcher:
        assert prefetcher.wait_seconds == 0
        prefetcher.get()
        prefetcher.get()
        assert 0.08 < prefetcher.wait_seconds < 5


def test_a_depth_of_zero_is_refused() -> None:
    with pytest.raises(DataError, match="depth=0"):
        Prefetcher(int, depth=0)
