"""Reading ahead and writing behind."""

from __future__ import annotations

import threading

import pytest
import torch

from codefend.core.overlap import Overlap


def test_results_come_in_order_and_only_computing_is_done_here() -> None:
    threads: dict[str, set[int]] = {"read": set(), "compute": set(), "write": set()}

    def step(name: str, item: int) -> int:
        threads[name].add(threading.get_ident())
        return item + 1

    with Overlap[int, int, int, int](
        lambda item: step("read", item), lambda item: step("compute", item), lambda item: step("write", item)
    ) as overlap:
        assert list(overlap.run(range(10))) == list(range(3, 13))
    assert threads["compute"] == {threading.get_ident()}
    assert threads["read"] == threads["write"] != threads["compute"]


def test_the_next_item_is_read_while_this_one_is_computed() -> None:
    second_is_read = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            second_is_read.set()
        return item

    def compute(item: int) -> int:
        assert item != 0 or second_is_read.wait(timeout=10)
        return item

    with Overlap(read, compute, str) as overlap:
        assert list(overlap.run([0, 1])) == ["0", "1"]


def test_at_most_three_items_are_held() -> None:
    held: list[int] = []

    def read(item: int) -> int:
        held.append(item)
        return item

    most = 0
    with Overlap(read, lambda item: item, lambda item: item) as overlap:
        for item in range(20):
            for _ in overlap.push(item):
                held.pop()
            most = max(most, len(held))
        assert overlap.drain() == [18, 19]
    assert most <= 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_computed_before_an_error_is_written(error: type[BaseException]) -> None:
    def compute(item: int) -> int:
        if item == 2:
            raise error
        return item

    with Overlap(int, compute, str) as overlap:
        results = overlap.run(range(5))
        assert [next(results), next(results)] == ["0", "1"]
        with pytest.raises(error):
            next(results)


def test_the_thread_computes_on_one_core_and_this_one_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Overlap[int, int, tuple[int, int], tuple[int, int]](
            lambda item: torch.get_num_threads(), lambda read: (read, torch.get_num_threads()), lambda made: made
        ) as overlap:
            assert list(overlap.run([0])) == [(1, 2)]
        fresh: list[int] = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert fresh == [2]
    finally:
        torch.set_num_threads(before)


def test_small_items_stay_in_this_thread() -> None:
    with Overlap[int, int, int, tuple[int, int]](
        lambda item: threading.get_ident(),
        lambda read: read,
        lambda made: (made, threading.get_ident()),
        small=lambda item: item % 2 == 0,
    ) as overlap:
        here = threading.get_ident()
        results = list(overlap.run(range(4)))
    assert [result == (here, here) for result in results] == [True, False, True, False]
