"""Set up every test: fixed seeds, two threads, poisoned memory, and clear reasons for a skip."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# Before OpenMP starts: its threads would spin while they wait, and take the cores from the tests beside.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before cuBLAS is first used, when torch reads it once: a test in `numerics` may follow one that multiplies without.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

THREADS = 2
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)
    # The same examples every time, and no limit on the time of one: a shared machine may pause anywhere.
    hypothesis.settings.register_profile("mtt_fast", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("mtt_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from mtt_fast.kernels import native

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device, and torch finds none here"
    if not native.available:
        missing["native"] = "needs the native kernels, which were not built or are turned off"
    for item in items:
        for marker in missing.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))
    # Hundreds of short jobs come last, so that at the end no process waits long for another one's test.
    items.sort(key=lambda item: item.path.name == "test_options_have_effect.py")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third-party code draws from it)
    torch.manual_seed(0)


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.native), "reference"])
def either_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels' operations dispatch to one back end of a CPU, then to the other."""
    monkeypatch.setattr("mtt_fast.kernels.native.available", request.param == "native")


@pytest.fixture
def golden() -> Path:
    """Return the folder of golden cases, which lies beside the repository."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"the golden cases are not here: no folder {folder}")
    return folder


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Let this process and its children ignore no signal, though the tests may run in the background or under nohup."""
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(signum, signal.SIG_DFL) for signum in signums]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in zip(signums, before, strict=True):
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Leave out the curves, which take most of a toy run; tests that ask for `curves` cover drawing them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtt_fast.commands.run_loop.save_curves", lambda *_: None)
        yield


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the curves in a test of a module without."""
    from mtt_fast.commands.plots import save_curves

    monkeypatch.setattr("mtt_fast.commands.run_loop.save_curves", save_curves)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what mtt_fast allocates without a value with NaN: an element that no kernel writes then fails the test."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "mtt_fast" and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.detach().fill_(float("nan"))
        return tensor

    return allocate_and_poison


@pytest.fixture(scope="module")
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the flags of a data and a buffer folder with the trained experts of the module's toy run, its `TOY`."""
    from mtt_fast.commands import cli
    from mtt_fast.distill.command import main

    folder = tmp_path_factory.mktemp("experts")
    flags = ["--data_path", str(folder / "data"), "--buffer_path", str(folder / "buffers")]
    assert cli.run(main, [*request.module.TOY, *flags, "--Iteration", "0", "--out", str(folder / "run")]) == 0
    return flags
