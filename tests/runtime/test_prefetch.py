"""Test items made ahead by a thread: the same items, errors where they belong, and nothing left running."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from mtt_fast.runtime.prefetch import download, prefetched, run_now_on_gpu, sender


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_same_items_in_order() -> None:
    assert list(prefetched(lambda i: i * i, range(7))) == [i * i for i in range(7)]
    assert list(prefetched(lambda i: i, range(1), depth=3)) == [0]
    assert list(prefetched(lambda i: i, ())) == []


def test_items_are_made_ahead_but_not_further() -> None:
    made = [threading.Event() for _ in range(9)]
    begun: list[int] = []

    def make(i: int) -> int:
        begun.append(i)
        made[i].set()
        return i

    with contextlib.closing(prefetched(make, range(9), depth=2)) as items:
        assert next(items) == 0
        assert made[2].wait(10)  # while item 0 is in use
        assert begun == [0, 1, 2]
        assert next(items) == 1
        assert made[3].wait(10)
        assert begun == [0, 1, 2, 3]


def test_indices_may_have_no_end() -> None:
    with contextlib.closing(prefetched(lambda i: i, itertools.count())) as items:
        assert list(itertools.islice(items, 5)) == [0, 1, 2, 3, 4]


def test_an_error_comes_where_its_item_would_have() -> None:
    def make(i: int) -> int:
        if i == 2:
            raise ValueError("item 2")
        return i

    items = prefetched(make, range(9))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(items)


def test_an_interruption_of_the_consumer_ends_the_thread() -> None:
    made = []

    def make(i: int) -> int:
        made.append(i)
        return i

    def consume() -> None:
        with contextlib.closing(prefetched(make, range(100))) as items:
            next(items)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert len(made) <= 3


def test_a_cpu_is_sent_the_tensors_themselves() -> None:
    tensors = (torch.ones(2), torch.ones(3))
    received = sender(torch.device("cpu"))(tensors)()
    assert all(mine is theirs for mine, theirs in zip(received, tensors, strict=True))


def test_a_cpus_tensors_are_fetched_as_they_are() -> None:
    tensors = (torch.ones(2), torch.tensor(3))
    assert all(mine is theirs for mine, theirs in zip(download(*tensors)(), tensors, strict=True))


@pytest.mark.gpu
def test_fetched_from_a_gpu_without_what_follows() -> None:
    values = torch.full((1000, 1000), 2.0, device="cuda")
    received = download(values, values.sum())
    for _ in range(50):
        values = values @ values / 1e3  # what the copies need not wait for
    copy, total = received()
    assert copy.device.type == total.device.type == "cpu"
    assert float(total) == float(copy.sum()) == 2e6


@pytest.mark.gpu
def test_sent_to_a_gpu() -> None:
    send = sender(torch.device("cuda"))

    def make(i: int) -> object:
        return send((torch.full((1000, 1000), float(i)),))

    for i, received in enumerate(prefetched(make, range(20))):
        (tensor,) = received()  # type: ignore[operator]
        assert tensor.is_cuda
        assert torch.equal(tensor, torch.full_like(tensor, float(i)))  # a sum of so many rounds


def test_work_starts_at_once_where_the_device_goes_on_alone() -> None:
    calls: list[str] = []
    pending = run_now_on_gpu(torch.device("cuda"), lambda: calls.append("cuda"))
    later = run_now_on_gpu(torch.device("cpu"), lambda: calls.append("cpu"))
    assert calls == ["cuda"]
    assert (pending(), pending(), later()) == (None, None, None)
    assert calls == ["cuda", "cpu"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_error_comes_where_its_result_is_asked_for(device: str) -> None:
    def work() -> None:
        raise ValueError("no result")

    result = run_now_on_gpu(torch.device(device), work)
    with pytest.raises(ValueError, match="no result"):
        result()
