"""Test the engines that are compared, their gate, which lets nothing wrong be timed, and the benchmarks' settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import flops, gate, meta_step
from bench.cases import Case, Gradients, case_on, make_case, small_setting
from bench.engines import ENGINES, Engine, checkpointed, engine_on, whole_graph
from bench.settings import SETTINGS, Setting, Shape, setting_named
from bench.workers import WorkerError
from mtt_fast import ConvNet, InputError, unroll
from mtt_fast.testing import relative_error
from tests.bench.helpers import CPU, TINY


def doubled(case: Case) -> Gradients:
    """Return the gradients of an engine that is wrong."""
    images, lr = whole_graph(case)
    return Gradients(2 * images, lr)


def wrong_in_float32(case: Case) -> Gradients:
    """Return the gradients of an engine that is right only in the small case."""
    images, lr = whole_graph(case)
    return Gradients(images if images.dtype == torch.float64 else images * (1 + 1e-3), lr)


@pytest.mark.parametrize("net", [{}, {"norm": "none"}, {"in_channels": 1}], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.native] * name.startswith("fused"))
        for name in ENGINES
        if name != "compiled"
    ],
)
def test_engines_that_claim_to_be_exact_are(name: str, net: dict[str, Any]) -> None:
    engine, setting = ENGINES[name], replace(TINY, net=replace(TINY.net, **net))
    if engine.package:
        pytest.importorskip(engine.package)
    error = gate.float64_error(engine, setting, CPU, cut=name.startswith(("generic", "fused")))
    assert (error <= gate.FLOAT64_TOLERANCE) == engine.exact


def test_an_engine_of_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "rival", Engine(whole_graph, package="no_such_package"))
    with pytest.raises(
        InputError, match="--engines rival: expected the package no_such_package; pip install no_such_package"
    ):
        engine_on("rival", CPU, "fp32")


def test_a_record_has_the_versions_of_other_libraries() -> None:
    engines = {"whole_graph": Engine(whole_graph), "rival": Engine(whole_graph, package="numpy")}
    assert meta_step.packages(engines) == {"other libraries": f"numpy {np.__version__}"}
    assert meta_step.packages({"whole_graph": Engine(whole_graph)}) == {}


def test_the_gate_closes_on_a_wrong_engine() -> None:
    error = gate.float64_error(Engine(doubled), TINY, CPU)
    assert error == pytest.approx(1)
    for errors, message in (
        ((error,), r"wrong: float64 error 1\.0e\+00, allowed 1e-09"),
        ((0.0, 3e-3, gate.allowed_float32(1e-3)), r"wrong: float32 error 3\.0e-03, allowed 2\.0e-03"),
        ((float("nan"),), "wrong: float64 error nan"),
        ((0.0, float("nan"), 1.0), "wrong: float32 error nan"),
    ):
        with pytest.raises(WorkerError, match=f"^{message}"):
            gate.check_errors(*errors)
    gate.check_errors(1e-12)
    gate.check_errors(1e-12, 1.9e-3, gate.allowed_float32(1e-3))
    gate.check_errors(1e-12, 1.5e-2, gate.allowed_float32(1e-3, "bf16"))


def test_the_gate_cuts_the_batches_of_an_engine_that_takes_limits() -> None:
    asked = []

    def engine(case: Case, **limits: int) -> Gradients:
        asked.append(limits)
        return whole_graph(case)

    for cut in (True, False):
        assert gate.float64_error(Engine(engine), TINY, CPU, cut=cut) == 0
    assert asked == [{"microbatch": 3}, {}]  # of batches of 4


def test_the_small_case_has_the_networks_blocks_and_norm() -> None:
    net = replace(TINY.net, depth=3, norm="none")
    small = small_setting(replace(TINY, net=net)).net
    assert (small.depth, small.norm, small.in_channels) == (3, "none", 3)
    assert isinstance(small.image_size, int)
    assert small.image_size >> 3 > 1  # pixels are left after the last block


def test_a_case_is_exact_in_float32_and_its_target_beyond_the_students_reach() -> None:
    case = make_case(TINY)
    for values in (case.start, case.target, case.images, case.lr):
        assert torch.equal(values.float().double(), values)
    end = unroll(case.net, case.start, case.images, case.labels, case.lr, case.batches)[-1]
    assert float((case.target - case.start).norm()) > 3 * float((end - case.start).norm())


def test_the_truth_in_pieces_is_the_truth() -> None:
    case = make_case(TINY)
    for mine, theirs in zip(checkpointed(case, microbatch=2), whole_graph(case), strict=True):
        assert relative_error(mine, theirs) < 1e-12


class CountOperations(TorchDispatchMode):
    """A mode that adds up the operations by torch's own formulas."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        self.count += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        return result


@pytest.mark.parametrize("name", ["whole_graph", "checkpointed", "truncated", "generic"])
def test_operations_are_counted_as_torch_counts_them(name: str) -> None:
    setting = Setting(ConvNet(3, 10, 16, width=4, depth=3), images=10, steps=2, batch=3)
    case = case_on(make_case(setting), torch.float32, CPU)
    with CountOperations() as counted:
        ENGINES[name].run(case)
    formula = flops.iteration_flops(setting.net, setting.steps, setting.batch, *ENGINES[name].passes)
    if name == "generic":  # unroll tries two gradients to parameters and images, and a forward pass, of two samples
        formula += flops.iteration_flops(setting.net, 1, 2, (6, 0))
    assert counted.count == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_follow_the_recipes(name: str) -> None:
    setting = setting_named(name)
    assert setting.images >= setting.batch
    assert setting.images == int(name.rpartition("ipc")[2]) * setting.net.num_classes


def test_the_settings_have_the_papers_numbers() -> None:
    assert (setting_named("cifar100-ipc50").steps, setting_named("cifar100-ipc50").batch) == (80, 125)
    assert (
        str(setting_named("imagenet128-ipc50")) == "ConvNet depth 5 width 128, 3×128×128, 10 classes, N = 20, b = 500"
    )
    one_a_class = [setting_named(f"{name}-ipc1").images for name in ("cifar10", "cifar100", "tiny", "imagenet128")]
    assert one_a_class == [10, 100, 200, 10]
    changed = Shape("cifar10-ipc1", steps=7, batch=50).resolve()
    assert (changed.steps, changed.batch, changed.images) == (7, 50, 50)
    assert Shape("cifar10-ipc10", steps=10).label() == "cifar10-ipc10-steps10"
    with pytest.raises(InputError, match=r"did you mean cifar10-ipc1"):
        setting_named("cifar-ipc1")
