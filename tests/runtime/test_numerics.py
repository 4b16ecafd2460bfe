"""Test the settings of a job: precision and determinism on CUDA, for as long as the job runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch

from mtt_fast import ConvNet, FlatModule, InputError
from mtt_fast.engine.students.choice import PrecisionRequest, describe_numerics, precision_on
from mtt_fast.kernels import Precision
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.runtime.numerics import numerics

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def fp32_precisions() -> dict[str, str]:
    backends: Any = torch.backends
    return {
        "conv": backends.cudnn.conv.fp32_precision,
        "rnn": backends.cudnn.rnn.fp32_precision,
        "matmul": backends.cuda.matmul.fp32_precision,
    }


def settings() -> dict[str, Any]:
    deterministic: Any = torch.utils.deterministic
    return {
        **fp32_precisions(),
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_cuda_is_set_and_set_back(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings()
    within = {}

    def interrupted() -> None:
        with numerics(CUDA, precision):
            within.update(settings())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    products = "ieee" if precision == "fp32" else "tf32"
    assert within == {
        "conv": products, "rnn": products, "matmul": products, "cudnn deterministic": True, "cudnn benchmark": False,
        "deterministic": True, "fill": False, "workspace": ":4096:8",
    }  # fmt: skip
    assert settings() == before


def test_a_callers_precision_does_not_matter_and_stays() -> None:
    """Set it in processes of their own, since torch cannot set back all of these. `allow_tf32` raises an error after some of them."""
    code = """
import os
import torch
from mtt_fast.kernels.triton.cudnn import _precision
from tests.runtime.test_numerics import CUDA, fp32_precisions, numerics
for setting in (
    "fp32_precision = 'tf32'", "fp32_precision = 'ieee'", "cudnn.conv.fp32_precision = 'ieee'",
    "cuda.matmul.fp32_precision = 'tf32'", "cudnn.allow_tf32 = False", "cuda.matmul.allow_tf32 = True",
):
    if os.fork():
        assert os.wait()[1] == 0, setting
        continue
    exec(f"torch.backends.{setting}")
    before = fp32_precisions()
    for precision, expected in (("fp32", "ieee"), ("tf32", "tf32")):
        with numerics(CUDA, precision):
            assert set(fp32_precisions().values()) == {expected}
        with _precision(precision):
            assert fp32_precisions()["conv"] == expected
    assert fp32_precisions() == before
    break
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_network_may_turn_cudnn_off(precision: Any) -> None:
    """Check that `flags`, without which cuDNN's recurrent layers have no second derivative, can read `allow_tf32`."""
    with numerics(CUDA, precision):
        with torch.backends.cudnn.flags(enabled=False):
            assert not torch.backends.cudnn.enabled
        allowed = precision != "fp32"
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (allowed, allowed)


def test_a_workspace_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with numerics(CUDA, "tf32"):
        assert settings()["workspace"] == ":16:8"
    assert settings()["workspace"] == ":16:8"


def test_nothing_is_set_for_a_cpu() -> None:
    before = settings()
    with numerics(CPU, "fp32"):
        assert settings() == before


def test_a_cpu_computes_in_float32() -> None:
    net = ConvNet(3, 4, 8, width=2, depth=1)
    requests: tuple[PrecisionRequest, ...] = get_args(PrecisionRequest)
    assert set(requests) == {"auto", *get_args(Precision)}
    for iterations in (False, True):
        assert {precision_on(CPU, net, request, iterations=iterations) for request in requests} == {"fp32"}
    assert describe_numerics(CPU, net, "auto", iterations=True).endswith("Student, fp32 (a CPU computes in float32)")


def test_what_is_no_precision_is_refused() -> None:
    with pytest.raises(InputError, match="`precision` fp8: expected auto, fp32, tf32, fp16, bf16"):
        precision_on(CPU, ConvNet(3, 4, 8, width=2, depth=1), cast(Precision, "fp8"))


def test_bf16_needs_the_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    net = FlatModule(torch.nn.Linear(3, 2))
    assert precision_on(CUDA, net, "tf32") == "tf32"
    with pytest.raises(
        InputError, match="`precision` bf16: only the fused step of ConvNet supports it, and FlatModule"
    ):
        precision_on(CUDA, net, "bf16")


@pytest.mark.parametrize(
    ("capability", "model", "precision", "reason"),
    [
        (
            (8, 0),
            "ConvNet",
            "fp16",
            "auto: in the iterations, about as exact as tf32 there; experts and evaluations take tf32",
        ),
        ((9, 0), "ConvNetD4W64", "fp16", "auto: in the iterations"),
        ((12, 0), "ConvNet", "fp16", "auto: in the iterations"),
        ((9, 0), "ResNet18", "tf32", "auto: only the fused step of ConvNet has fp16"),
        ((9, 0), "ConvNetBN", "tf32", "auto: only the fused step of ConvNet has fp16"),
    ],
)
def test_auto_takes_fp16_for_the_iterations_where_tensor_cores_have_it(
    capability: tuple[int, int], model: str, precision: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    network = network_by_name(model, (3, 32, 32), 10)
    assert precision_on(CUDA, network, "auto", iterations=True) == precision
    assert f", {precision} ({reason}" in describe_numerics(CUDA, network, "auto", iterations=True)
    # of experts, evaluations and baselines
    assert precision_on(CUDA, network, "auto") == "tf32"
    assert "tf32 (auto: fp16 is only for the iterations" in describe_numerics(CUDA, network, "auto")
    assert precision_on(CUDA, network, "tf32", iterations=True) == "tf32"
    assert precision_on(CUDA, network, "fp32", iterations=True) == "fp32"
    assert ", tf32 (as requested)" in describe_numerics(CUDA, network, "tf32")


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
@pytest.mark.parametrize("requested", ["auto", "tf32"])
@pytest.mark.parametrize("model", ["ConvNet", "ResNet18"])
def test_a_gpu_without_tf32_computes_in_fp32(
    capability: tuple[int, int], requested: PrecisionRequest, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    network = network_by_name(model, (3, 32, 32), 10)
    assert precision_on(CUDA, network, requested) == precision_on(CUDA, network, requested, iterations=True) == "fp32"
    assert f", fp32 ({requested}: this GPU has no tf32" in describe_numerics(CUDA, network, requested)
