"""Test steps whose batches several processes share: against one process and whole-graph autograd, in float64."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import mtt_fast
from mtt_fast import InputError, Plan
from mtt_fast.engine.agreement import check_agreement, checksum_of, sums_of_bits
from mtt_fast.testing import assert_close, module_function, reference_convnet
from tests.engine.process_cases import (
    BATCHES,
    CLASSES,
    DSA,
    IMAGES,
    NET,
    REFUSED,
    SHARED,
    call,
    draws,
    live_bytes,
    loss_of,
    of_pairs,
    wide,
)

ROOT = Path(__file__).resolve().parents[2]
CONVNET = module_function(reference_convnet(3, 4, 8, 6, 2))
PROCESSES = 3
GROUPS = (2, PROCESSES)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return the outcomes of all processes by the size of their group."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.engine.process_cases", str(PROCESSES), str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=200)
    found = {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in GROUPS}
    return found | {0: [torch.load(folder / "outside.pt")]}


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("name", SHARED)
def test_several_processes_compute_what_one_does(name: str, size: int, outcomes: Any) -> None:
    expected = SHARED[name](None)
    first, *others = (each[name] for each in outcomes[size])
    for n, (found, wanted) in enumerate(zip(first, expected, strict=True)):
        assert_close(f"result {n}", found, wanted, 1e-12)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("size", GROUPS)
def test_several_processes_compute_what_autograd_does(size: int, outcomes: Any) -> None:
    start, images = (
        NET.init(torch.Generator().manual_seed(2)).double().requires_grad_(),
        IMAGES.clone().requires_grad_(),
    )
    lr = torch.linspace(0.1, 0.2, len(BATCHES)).double().requires_grad_()
    path, velocity = [start], torch.zeros_like(start)
    for index, drawn, rate in zip(BATCHES, draws(), lr, strict=True):
        loss = F.cross_entropy(CONVNET(path[-1], DSA(images[index], drawn)), CLASSES[index])
        (gradient,) = torch.autograd.grad(loss, path[-1], create_graph=True)
        velocity = 0.5 * velocity + gradient + 0.01 * path[-1]
        path.append(path[-1] - rate * velocity)
    expected = torch.autograd.grad(loss_of(path), [start, images, lr])
    _, *found = outcomes[size][0]["DSA, momentum, a rate for each step"]
    for name, each, wanted in zip(("start", "images", "lr"), found, expected, strict=True):
        assert_close(name, each, wanted, 1e-9)


@pytest.mark.parametrize("size", GROUPS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_in_all_processes(name: str, size: int, outcomes: Any) -> None:
    remedies = {
        "order": "`batches`: expected the same in all processes of the `group`, found others in some",
        "draws of numpy": "`draws`: expected the same in all processes",
        "draws of the same digits": "`draws`: expected the same in all processes",
        "grad mode": "`images`: expected the same in all processes",
        "another loss": "`group`: expected the same loss of the path in all processes, found gradients that differ",
        "a loss of another row": "`group`: expected the same loss of the path in all processes",
        "meta": "`group`: expected numbers, found theta on the device meta",
        "momentum, velocity": "`momentum`, `velocity`: expected the same in all processes",
        "batch norm": "`group`: the network's batch norm uses batch statistics",
        "samples that mix": "`net`: expected samples that do not depend on each other",
        "pairs": "`loss`: expected a mean over the samples, since the processes of the `group` share each batch",
        "hardest": "`loss`: expected a mean over the samples, since the processes",
        "a changed loss": "expected the same network, loss, augmentation and path in the backward pass as in the call",
        "a changed augmentation": "expected the same network, loss, augmentation and path in the backward pass as in the call",
        "a mean at first": "`loss`: expected a mean over the samples",
    }
    for each in outcomes[size]:
        assert each[name].startswith(remedies.get(name, f"`{name}`: expected the same in all processes")), each[name]


def test_a_process_takes_the_memory_of_its_share(outcomes: Any) -> None:
    whole = mtt_fast.plan(wide(), images=(24, 3, 16, 16), steps=1, memory_budget=None)
    alone = live_bytes(None)
    for size in GROUPS:
        share = Plan(dataclasses.replace(whole.work, batch=24 // size, processes=size), 24)
        planned = share.peak_bytes - share.parts["rest"]
        for outcome in outcomes[size]:
            assert outcome["bytes"] < (1 / size + 0.1) * alone
            assert outcome["bytes"] < planned < whole.peak_bytes


def test_a_group_without_this_process_is_refused(outcomes: Any) -> None:
    message = "`group`: expected a process group of torch.distributed that this process belongs to, found"
    assert outcomes[0][0].startswith(message)
    with pytest.raises(InputError, match=message):
        call("WORLD")  # type: ignore[arg-type]


def test_a_group_of_one_process_shares_nothing(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert torch.equal(call(dist.group.WORLD, loss=of_pairs), call(None, loss=of_pairs))
    finally:
        dist.destroy_process_group()


def test_a_capture_in_which_processes_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.engine.agreement.is_capturing", lambda _: True)
    with pytest.raises(InputError, match="`group`: expected no capture of a CUDA graph"):
        check_agreement(None, torch.zeros(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.complex128])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (40, 3, 32, 32)], ids=str)
def test_a_checksum_sees_each_number_and_the_order(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape).remainder(7).to(dtype)
    checksum = checksum_of([{"draws": tensor}, 0.1, "flip", None])
    assert checksum == checksum_of([{"draws": tensor.clone()}, 0.1, "flip", None])
    assert checksum not in (
        checksum_of([{"draws": tensor}, 0.2, "flip"]),
        checksum_of([{"draws": tensor}, 0.1, "crop"]),
    )
    for place in range(0, tensor.numel(), 997):
        other = tensor.clone()
        other.view(-1)[place] = not other.view(-1)[place]
        assert checksum_of(other) != checksum_of(tensor)
        assert not torch.equal(sums_of_bits(other), sums_of_bits(tensor))
    if len(shape) > 1:
        assert checksum_of(tensor.roll(1, 0)) != checksum_of(tensor)
        assert not torch.equal(sums_of_bits(tensor.roll(1, 0)), sums_of_bits(tensor))


def test_a_checksum_sees_rows_that_change_places() -> None:
    images = torch.arange(1100 * 64).view(1100, 64).float()
    for other in (1, 64, 1021, 1099):
        swapped = images.clone()
        swapped[[0, other]] = images[[other, 0]]
        assert checksum_of(swapped) != checksum_of(images)
        assert not torch.equal(sums_of_bits(swapped), sums_of_bits(images))


def test_a_checksum_sees_arrays_and_no_addresses() -> None:
    assert checksum_of((np.arange(3), object())) == checksum_of((np.arange(3), object()))
    for other in (np.arange(1, 4), np.arange(3)[None], np.arange(3, dtype=np.uint64)):
        assert checksum_of(other) != checksum_of(np.arange(3))
