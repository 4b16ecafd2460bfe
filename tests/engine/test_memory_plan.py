"""Test memory plans: the prediction before the first step, held to peaks measured from outside in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mtt_fast
from mtt_fast import Adam, ConvNet, FlatModule, InputError, Plan, SiameseAugment, matching_loss, unroll
from mtt_fast.augmentation.texture import CanvasCrops
from mtt_fast.engine import memory_plan
from mtt_fast.engine.students.batch_loss import BatchLossStudent
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent, cross_entropy
from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import Loss
from mtt_fast.kernels import native
from mtt_fast.kernels.native import planes
from mtt_fast.networks.convnet import Norm
from mtt_fast.runtime.memory_info import parse_bytes
from mtt_fast.testing import reference_convnet
from tests.engine.counting import image_shape, live_bytes_of_a_step

GIB, MIB = 2**30, 2**20
CPU = torch.device("cpu")

PROGRAM = """
import dataclasses, json, resource, sys
import torch
from mtt_fast import ConvNet
from mtt_fast import SiameseAugment
from mtt_fast import matching_loss
from mtt_fast import plan
from mtt_fast import unroll
from mtt_fast.augmentation.texture import CanvasCrops

torch.set_num_threads(2)

def peak(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def resident():  # exactly; a kernel may sum up VmRSS only roughly
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))

def faulted_in():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()

def run(size, width, depth, steps, batch, kept=0, augment=False, canvas=1, again=0, **options):
    net = ConvNet(image_size=size, width=width, depth=depth)
    start = net.init(torch.Generator().manual_seed(0))
    images = torch.randn(batch, 3, canvas * size, canvas * size, requires_grad=True)
    augmentation = CanvasCrops(canvas, SiameseAugment()) if canvas > 1 else SiameseAugment() if augment else None
    lr = torch.tensor(0.01, requires_grad=True)
    shape = {"images": images, "steps": steps, "augment": augmentation or False}
    chosen = dataclasses.replace(plan(net, **shape, **{"memory_budget": None, **options}), saved_steps=kept)
    if "memory_budget" in options:
        chosen = plan(net, **shape, **options)
    labels, batches = torch.arange(batch) % 10, torch.arange(batch).expand(steps, batch)
    target = start + 0.01
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = peak("VmRSS")
    faults, growth = [], []
    for _ in range(1 + again):
        growth.append(-resident())
        faults.append(-faulted_in())
        path = unroll(net, start, images, labels, lr, batches, plan=chosen, augment=augmentation)
        matching_loss(path[-1], start, target).backward()
        faults[-1] += faulted_in()
        growth[-1] += resident()
    return {"measured": peak("VmHWM") - before, "planned": chosen.peak_bytes, "faults": faults, "growth": growth}

for canvas in (1, 2):  # libraries and thread pools are loaded, those of both ways to augment
    run(16, 32, 2, 2, 2, augment=True, canvas=canvas)
print(json.dumps(run(**json.loads(sys.argv[1]))))
"""

# Every freed block of 64 KiB goes back at once: the peak is what lives, without what glibc's heap keeps between blocks in use,
# which differs from process to process by up to a fifth of so small a peak.
AS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")


def measured(environment: dict[str, str] | None = None, **case: Any) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(case)]
    given = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | (environment or {})
    finished = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200, env=given)
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


@needs_proc
@pytest.mark.native
@pytest.mark.parametrize(
    "case",
    [
        {"size": 32, "width": 128, "depth": 3, "steps": 2, "batch": 50},
        {"size": 32, "width": 64, "depth": 3, "steps": 5, "batch": 60, "kept": 3},
        {"size": 32, "width": 128, "depth": 3, "steps": 10, "batch": 60, "microbatch": 20, "augment": True},
        {"size": 128, "width": 64, "depth": 5, "steps": 2, "batch": 10},
        {"size": 64, "width": 96, "depth": 4, "steps": 3, "batch": 16, "microbatch": 8, "kept": 2},
        {"size": 16, "width": 256, "depth": 3, "steps": 30, "batch": 8},
        {"size": 64, "width": 64, "depth": 4, "steps": 3, "batch": 16, "microbatch": 8, "augment": True, "canvas": 3},
    ],
    ids=lambda case: "-".join(f"{name}{value}" for name, value in case.items()),
)
@pytest.mark.slow
def test_the_formula_is_what_is_measured(case: dict[str, Any]) -> None:
    memory = measured(AS_FREED, **case)
    assert 0.8 * memory["planned"] <= memory["measured"] <= memory["planned"]


@pytest.mark.native
@pytest.mark.parametrize("batch", [10, 50])
@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("loss", [None, cross_entropy], ids=["kernels", "own loss"])
def test_a_step_is_counted_to_a_tenth(
    loss: Loss | None, depth: int, norm: Norm, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        planes, "allocate", lambda like, shape: like.new_empty(shape)
    )  # torch's memory, which is counted
    net = ConvNet(3, 10, 32, 64, depth, norm)
    student = FusedConvNetStudent(net, loss=loss)
    counted = live_bytes_of_a_step(student, net, batch, "cpu")
    formula = student.step_bytes(batch, image_shape(net), torch.float32, CPU)._replace(
        workspace=0
    )  # torch does not count it
    assert tuple(counted) == pytest.approx(tuple(formula), rel=0.1)


@pytest.mark.native
def test_pieces_are_counted_beside_what_those_before_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "allocate", lambda like, shape: like.new_empty(shape))
    net = ConvNet(3, 10, 32, 64, 3)
    student = InMicrobatches(FusedConvNetStudent(net), 10)
    counted = live_bytes_of_a_step(student, net, 25, "cpu")
    formula = student.step_bytes(25, image_shape(net), torch.float32, CPU)
    assert counted.saved == pytest.approx(formula.saved, rel=0.1)
    assert counted.gradient_saving == pytest.approx(formula.gradient_saving, rel=0.1)


def test_steps_of_a_loss_that_is_not_a_mean_save_nothing() -> None:
    net = ConvNet(3, 10, 32, 64, 3)
    student = BatchLossStudent(GenericStudent(net, cross_entropy), 10)
    formula = student.step_bytes(25, image_shape(net), torch.float32, CPU)
    assert live_bytes_of_a_step(student, net, 25, "cpu").saved == formula.saved == 0
    assert (formula.gradient_saving, formula.gradient_jvp_saved) == (formula.gradient, formula.gradient_jvp)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": Adam()}], ids=["momentum", "Adam"])
def test_unroll_plans_for_the_state_of_its_optimizer(options: dict[str, Any]) -> None:
    net, images = ConvNet(image_size=8, width=64, depth=2), torch.zeros(2, 3, 8, 8)
    batches = torch.arange(2).expand(3, 2)
    cuts = [mtt_fast.plan(net, images=images, steps=3, microbatch=size, **options) for size in (1, 2)]
    budget = min(cut.peak_bytes for cut in cuts) - 1
    arguments = (net, net.init(), images, torch.arange(2), 0.01, batches)
    unroll(*arguments, memory_budget=budget)
    with pytest.raises(InputError, match="expected at least"):
        unroll(*arguments, memory_budget=budget, **options)


OPTIMIZERS: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"optimizer": Adam(weight_decay=0.1)}]


def live_and_planned_bytes(
    loss: Callable[[Tensor, Tensor], Tensor],
    options: dict[str, Any],
    *,
    steps: int = 3,
    on_host: bool = False,
    **work: Any,
) -> tuple[int, int]:
    """Return the peak of what torch allocates on the device, and its plan.

    The network is nearly all parameters. `loss` is one of the path and its start, to which that of the last state is added.
    """
    net, images = ConvNet(image_size=8, width=128, depth=2), torch.zeros(2, 3, 8, 8, requires_grad=True)
    whole = mtt_fast.plan(net, images=images, steps=steps, memory_budget=None, **work, **options)
    chosen = dataclasses.replace(whole, path_on_host=on_host)
    start, batches = net.init(torch.Generator().manual_seed(0)), torch.arange(2).expand(steps, 2)
    with CountLiveBytes() as counted:
        more: dict[str, Any] = {"plan": chosen, "return_velocity": bool(options), **options}
        result: Any = unroll(net, start, images, torch.arange(2), 0.01, batches, **more)
        path, *state = result if options else (result,)
        torch.stack([loss(path, start).double(), *(each.sum().double() for each in state)]).sum().backward()
    vector, parts = 4 * net.num_parameters, chosen.parts
    in_host_memory = (steps + 1) * (1 + chosen.work.moments) * vector if on_host else 0  # is counted, too
    planned = sum(parts[name] for name in ("path", "vectors", "images", "step"))  # torch does not count the workspace
    numbers = 2**13  # (), for which the plan's rest has room; a vector takes 70 times as much
    return counted.peak - in_host_memory - numbers, planned


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("options", OPTIMIZERS, ids=["SGD", "momentum", "Adam"])
def test_the_allowance_for_the_vectors_of_an_optimizer_is_enough(options: dict[str, Any], on_host: bool) -> None:
    live, planned = live_and_planned_bytes(
        lambda path, start: matching_loss(path[-1], start, start + 1), options, on_host=on_host
    )
    assert live <= planned


@pytest.mark.parametrize("options", OPTIMIZERS, ids=["SGD", "momentum", "Adam"])
@pytest.mark.parametrize(
    ("loss", "path_gradient"),
    [
        (lambda path, start: mtt_fast.masked_matching_loss(path[-1], start, start + 1, 0.5), False),
        (lambda path, start: sum(matching_loss(path[n], start, start + 1) for n in (9, 6, 3)), False),
        (lambda path, start: sum(matching_loss(path[n], start, start + 1) for n in range(1, 10)), True),
        (lambda path, _: path.mean(), True),
    ],
    ids=["masked", "three rows", "all rows", "mean"],
)
def test_the_allowance_for_a_loss_of_the_path_is_enough(
    loss: Any, path_gradient: bool, options: dict[str, Any]
) -> None:
    live, planned = live_and_planned_bytes(loss, options, steps=9, path_gradient=path_gradient)
    assert live <= planned
    # Without it the plan would be too small, unless the step, where there are no kernels, takes much more than the path.
    if path_gradient and native.available:
        live, planned = live_and_planned_bytes(loss, {}, steps=9)
        assert live > planned


@needs_proc
@pytest.mark.native
@pytest.mark.slow
def test_no_page_of_the_steady_state_is_faulted_in_twice() -> None:
    # as the command lines tell glibc, which keeps what is small
    keeps = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    memory = measured(keeps, size=32, width=64, depth=3, steps=4, batch=40, kept=2, augment=True, again=8)
    # Now and then an iteration enlarges glibc's heap: its augmentation is drawn, and something small may lie where a plane of
    # the last block fitted before. Those pages are new, and stay; any other page that is faulted in had been given back.
    given_back = [max(0, faulted - new) for faulted, new in zip(memory["faults"], memory["growth"], strict=True)]
    assert sum(given_back[1:]) <= 0.01 * memory["planned"]
    assert min(memory["faults"][1:]) <= 0.01 * memory["planned"]  # the heap does not grow for ever
    assert memory["measured"] <= 1.15 * memory["planned"]


@needs_proc
@pytest.mark.slow
def test_peak_grows_with_the_steps_by_the_parameters_alone() -> None:
    case = {"size": 32, "width": 64, "depth": 3, "batch": 8}
    few, many = (measured(AS_FREED, steps=steps, **case)["measured"] for steps in (5, 40))
    assert many - few <= 1.1 * 35 * 4 * ConvNet(image_size=32, width=64).num_parameters


@needs_proc
@pytest.mark.parametrize(
    ("budget", "native"),
    [
        ("16MiB", "1"),
        ("30MiB", "1"),
        ("60MiB", "1"),
        ("40MiB", "0"),
        ("100MiB", "0"),
        ("250MiB", "0"),
    ],
)
@pytest.mark.slow
def test_the_budget_holds(budget: str, native: str) -> None:
    case = {"size": 32, "width": 32, "depth": 3, "steps": 4, "batch": 40}
    memory = measured({"MTT_FAST_NATIVE": native}, memory_budget=budget, **case)
    assert memory["measured"] <= parse_bytes(budget)


def test_classes_of_pixels_are_gathered_step_by_step() -> None:
    net = FlatModule(torch.nn.Conv2d(1, 3, 1))
    images, labels = torch.randn(4, 1, 32, 32), torch.zeros(4, 32, 32, dtype=torch.long)
    peaks = []
    for steps in (2, 20):
        with CountLiveBytes() as counted:
            path = unroll(
                net, net.init(), images.requires_grad_(), labels, 0.1, torch.arange(4).expand(steps, 4),
                loss=torch.nn.functional.cross_entropy,
            )  # fmt: skip
            path[-1].sum().backward()
        peaks.append(counted.peak)
    assert peaks[1] - peaks[0] < labels.nbytes


def planned(memory_budget: int | str | None, net: Any = None, **options: Any) -> Plan:
    case: dict[str, Any] = {"images": (50, 3, 32, 32), "steps": 5} | options
    return mtt_fast.plan(net or ConvNet(width=16), memory_budget=memory_budget, **case)


def test_a_plan_counts_what_each_option_keeps() -> None:
    net = ConvNet(width=16)
    vector, batch = 4 * net.num_parameters, 4 * 50 * 3 * 32 * 32

    def more(**options: Any) -> dict[str, int]:
        plain, with_it = planned(None, net).parts, planned(None, net, **options).parts
        return {name: size - plain[name] for name, size in with_it.items() if size != plain[name] and name != "rest"}

    assert more(momentum=0.9) == {"path": 6 * vector, "vectors": 2 * vector}  # velocities; their adjoint, the direction
    assert more(optimizer=Adam()) == {"path": 12 * vector, "vectors": 9 * vector}
    assert more(path_gradient=True) == {"path": 6 * vector}
    assert more(augment=True) == more(augment=SiameseAugment()) == {"images": batch}
    assert more(steps=7) == {"path": 2 * vector}
    # the sum of the pieces' gradients, and the images' gradients of all pieces together
    assert more(microbatch=50) == {}
    cut = more(microbatch=25)
    assert (cut["vectors"], cut["images"]) == (vector, batch)
    on_host = dataclasses.replace(planned(None, net), path_on_host=True)
    assert on_host.parts["path"] == 2 * vector
    for options, vectors in (({"momentum": 0.9}, 4), ({"optimizer": Adam()}, 6)):  # two buffers for the states, too
        with_state = dataclasses.replace(planned(None, net, **options), path_on_host=True)
        assert with_state.parts["path"] == vectors * vector
    canvases = planned(None, net, images=(50, 3, 64, 64), augment=CanvasCrops(2))
    assert canvases.parts["images"] == 4 * batch + 3 * batch  # the canvases, and copies of their crops


def test_with_more_memory_pieces_grow_and_then_activations_are_kept() -> None:
    plans = [planned(f"{size}MiB") for size in (12, 16, 30, 60, 200)]
    pieces, saved = [plan.microbatch for plan in plans], [plan.saved_steps for plan in plans]
    assert pieces == sorted(pieces)
    assert pieces[0] < pieces[1] < pieces[-1] == 50
    assert all(size == math.ceil(50 / math.ceil(50 / size)) for size in pieces)  # as even as can be
    assert saved == sorted(saved)
    assert saved[-1] == 5 if native.available else saved[-1] > 0
    for plan in plans:
        assert plan.budget is not None
        assert plan.peak_bytes <= plan.budget
        assert plan.peak_bytes == sum(plan.parts.values())
    assert planned(None).saved_steps == 0
    assert planned("10GiB").peak_bytes < GIB  # not more than is useful
    with pytest.raises(
        InputError,
        match=r"^`memory_budget` 1MiB: expected at least .* MiB for 5 steps of 50 images; raise it, or lower `batch` or `steps`$",
    ):
        planned("1MiB")
    net = ConvNet(width=16)
    theta, images, labels = net.init(), torch.zeros(50, 3, 32, 32), torch.zeros(50, dtype=torch.long)
    with pytest.raises(InputError, match=r"^`memory_budget` 1: .* raise it, or give fewer or smaller `batches`$"):
        mtt_fast.unroll(net, theta, images, labels, 0.1, torch.arange(50)[None], memory_budget=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "^`steps`: expected at least 1, found 0$"),
        ({"steps": 2.5}, "^`steps`: expected a whole number, found 2.5$"),
        ({"steps": None}, "^`steps`: expected a whole number, found None$"),
        ({"device": "gpu"}, "^`device`: expected a device of torch, such as cpu or cuda, found .gpu.$"),
        ({"batch": -3}, "^`batch`: expected at least 1, found -3$"),
        ({"images": (3, 32, 32)}, r"^`images`: expected a tensor or a shape \(n, C, H, W\), found \(3, 32, 32\)$"),
        ({"images": (50, 3, 64, 64)}, r"^`images`: expected .* 3 channels and size 32, found \(3, 64, 64\)$"),
        ({"images": (50, 1, 32, 32)}, r"^`images`: expected .*, found \(1, 32, 32\)$"),
        ({"images": torch.zeros(2, 0, 4, 4)}, r"^`images`: .* found \(2, 0, 4, 4\)$"),
        ({"images": 50}, r"^`images`: expected .*, found 50$"),
        ({"momentum": -1.0}, "^`momentum`: expected a finite number of at least 0, found -1.0$"),
        ({"augment": "crop"}, "^`augment`: expected an augmentation, such as SiameseAugment, found str$"),
        ({"microbatch": 3}, "^expected `microbatch` or `memory_budget`, found both"),
        ({"dtype": torch.float16}, "^`dtype`: expected torch.float32 or torch.float64, found torch.float16$"),
        ({"dtype": "float32"}, "^`dtype`: expected .*, found 'float32'$"),
        ({"device": "cuda:99"}, "^`device` cuda:99: this machine has .* usable GPUs"),
    ],
)
def test_a_plan_of_wrong_arguments_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned("1GiB", **change)


def test_a_network_that_reads_values_is_told_with_the_line_that_does() -> None:
    class Reads(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images if bool((images > 0).any()) else images + 1)

    line = Reads.forward.__code__.co_firstlineno + 1
    message = (
        rf"on meta tensors' \({re.escape(__file__)}, line {line}\) for images \(5,\); .* read no tensor's value in it"
    )
    with pytest.raises(InputError, match=message):
        mtt_fast.plan(FlatModule(Reads(5, 2)), images=(4, 5), steps=2, memory_budget="1GiB")


def test_a_smaller_plan_saves_nothing_and_then_has_pieces_of_half_the_size() -> None:
    whole = planned(None)
    assert dataclasses.replace(whole, saved_steps=2).smaller() == whole
    assert [planned(None, microbatch=size).smaller().microbatch for size in (200, 50, 7)] == [25, 25, 3]


@pytest.mark.native
def test_imagenet_of_50_a_class_is_planned_below_4_gib() -> None:
    net = ConvNet(image_size=128, depth=5)
    plan = planned("4GiB", net, images=(500, 3, 128, 128), steps=20, augment=True)
    assert plan.peak_bytes <= 4 * GIB
    assert plan.microbatch >= 10
    assert str(plan).startswith("memory plan: 20 steps on 500 images, in ")
    assert "MiB of 4096 MiB" in str(plan)


@pytest.mark.native
def test_a_plan_of_a_billion_images_takes_no_time() -> None:
    with pytest.raises(InputError, match=r"expected at least \d+ MiB for 1 steps of 1000000000 images"):
        mtt_fast.plan(ConvNet(image_size=8, depth=1), images=(10**9, 3, 8, 8), steps=1, memory_budget="1GiB")


def test_costs_are_counted_in_convolution_passes() -> None:
    whole = planned(None)
    assert whole.passes == 11
    assert dataclasses.replace(whole, saved_steps=5).passes == 9
    assert dataclasses.replace(whole, saved_steps=1).passes == pytest.approx(10.6)
    assert "10.6 convolution passes a step, 9 at least" in str(dataclasses.replace(whole, saved_steps=1))


def test_batch_statistics_need_the_whole_batch() -> None:
    net = FlatModule(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()))
    one_dimensional = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4), torch.nn.BatchNorm1d(4))
    for each in (net, FlatModule(one_dimensional)):  # the latter takes no sample alone
        assert planned("1GiB", each).microbatch == 50
    with pytest.raises(InputError, match="batch statistics: the batch cannot be cut"):
        planned("10MiB", net)
    with pytest.raises(
        InputError, match=r"batch statistics, which cannot be cut .* the resolution, `steps` or `batch`, or"
    ):
        planned(None, net).smaller()


def test_what_a_step_holds_is_found_without_computing_it() -> None:
    net = FlatModule(torch.nn.Linear(1000, 1, bias=False))
    held = GenericStudent(net).live_bytes(1, torch.Size((1000,)), torch.float64)
    assert 8 * 1000 <= held.gradient < 8 * 2100
    # the gradient to θ, and its derivatives to θ and the image
    assert 8 * 3000 <= held.gradient_jvp < 8 * 8100
    # what is kept is a copy of θ and the gradient, in the step's peak beside what it takes itself
    assert 8 * 2000 <= held.saved < 8 * 3100
    assert held.saved <= held.gradient_saving < 8 * 5100
    assert 0 < held.gradient_jvp_saved < held.gradient_jvp
    assert GenericStudent(net).live_bytes(1, torch.Size((1000,)), torch.float32).saved == held.saved // 2


def test_one_copy_of_frozen_parameters_lives_in_a_step_and_is_counted() -> None:
    frozen = torch.nn.Linear(1000, 1000, bias=False).requires_grad_(False)
    net = FlatModule(torch.nn.Sequential(frozen, torch.nn.Linear(1000, 1)))
    size, images = frozen.weight.nbytes, torch.randn(4, 1000, requires_grad=True)
    with CountLiveBytes() as counted:  # the trial too, which calls the network twice
        path = unroll(net, net.init(), images, torch.zeros(4), 0.1, torch.arange(4).expand(2, 4), loss=mse_of_columns)
        path[-1].sum().backward()
    planned = GenericStudent(net).live_bytes(4, images.shape[1:], torch.float32)
    for live in (counted.peak, planned.gradient, planned.gradient_saving, planned.gradient_jvp, planned.saved):
        assert size < live < 1.1 * size
    assert planned.gradient_jvp_saved < 0.1 * size


def mse_of_columns(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square().mean()


def test_a_network_without_a_hash_is_refused_where_memory_is_counted() -> None:
    @dataclasses.dataclass
    class Linear:
        num_parameters: int = 10
        mixes_samples: bool = False

        def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
            return images.flatten(1) @ theta.view(5, 2)

    with pytest.raises(InputError, match=r"`net`: expected a hashable network.*unhashable type.*eq=False"):
        GenericStudent(Linear()).live_bytes(1, torch.Size((5,)), torch.float64)


@pytest.mark.parametrize("reading", ["a tensor of its own", "a sparse buffer", "an array", "a value"])
def test_a_network_that_needs_data_is_refused_where_memory_is_counted(reading: str) -> None:
    class Reading(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = torch.nn.Linear(4, 3), torch.ones(4)
            self.edges: Tensor
            if reading == "a sparse buffer":
                self.register_buffer("edges", torch.eye(4).to_sparse())

        def forward(self, rows: Tensor) -> Tensor:
            if reading == "a tensor of its own":
                rows = rows * self.scale
            elif reading == "a sparse buffer":
                rows = torch.sparse.mm(self.edges, rows.T).T
            elif reading == "an array":
                rows = rows * float(rows.detach().numpy().max())
            else:
                rows = rows * float(rows.detach().norm())
            logits: Tensor = self.linear(rows)
            return logits

    net, rows, labels = FlatModule(Reading()), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(InputError, match=r"`net`: .* without data, .* found .* dense buffers of a module"):
        unroll(net, net.init(), rows, labels, 0.1, [torch.arange(5)], memory_budget="1GiB")
    unroll(net, net.init(), rows, labels, 0.1, [torch.arange(5)])


@pytest.mark.parametrize("size", [0, -1])
def test_a_plan_without_pieces_is_refused(size: int) -> None:
    """Check what would take no image at all, so that the student would not move."""
    net = FlatModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)))
    given = dataclasses.replace(mtt_fast.plan(net, images=(4, 3, 2, 2), steps=1, memory_budget=None), microbatch=size)
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4) % 2
    with pytest.raises(InputError, match=f"`plan`: expected a `microbatch` of at least 1 in it, found {size}"):
        unroll(net, torch.randn(26), images, labels, 0.1, torch.arange(4)[None], plan=given)
    with pytest.raises(InputError, match=r"`plan`: expected what mtt_fast\.plan returned, found int"):
        unroll(net, torch.randn(26), images, labels, 0.1, torch.arange(4)[None], plan=size)  # type: ignore[call-overload]


def module_and_sizes(inputs: int) -> tuple[FlatModule, list[int]]:
    """Return a module, and a list that receives the numbers of samples with which it is called."""
    sizes: list[int] = []

    class Recorded(torch.nn.Flatten):
        def forward(self, images: Tensor) -> Tensor:
            if not images.is_meta:
                sizes.append(len(images))
            return super().forward(images)

    return FlatModule(torch.nn.Sequential(Recorded(), torch.nn.Linear(inputs, 2))), sizes


def test_a_plan_for_smaller_batches_cuts_larger_ones() -> None:
    net, sizes = module_and_sizes(12)
    made = mtt_fast.plan(net, images=(20, 3, 2, 2), steps=1, batch=10, memory_budget=None)
    images, labels = torch.randn(20, 3, 2, 2), torch.arange(20) % 2
    unroll(net, torch.randn(26), images, labels, 0.1, torch.arange(20)[None], plan=made)
    assert max(sizes) == 10


def test_a_plan_for_smaller_steps_keeps_its_budget() -> None:
    net, sizes = module_and_sizes(3072)
    small, large = (
        mtt_fast.plan(net, images=(400, 3, 32, 32), steps=4, batch=batch, memory_budget="60MiB") for batch in (4, 400)
    )
    images, labels = torch.randn(400, 3, 32, 32), torch.arange(400) % 2
    unroll(net, torch.randn(6146), images, labels, 0.1, torch.arange(400).expand(4, -1), plan=small)
    assert max(sizes) == large.microbatch < 400


def test_a_module_keeps_the_graphs_of_steps_that_fit() -> None:
    """Check that with memory to spare it costs as much as autograd through all steps; in pieces, as each piece's."""
    net = FlatModule(reference_convnet(3, 10, 32, 16, 3))
    saved = [planned(budget, net).saved_steps for budget in (None, "100MiB", "150MiB", "1GiB")]
    assert saved[0] == 0
    assert saved == sorted(saved)
    assert 0 < saved[2] < saved[3] == 5
    assert planned("1GiB", net).passes == 9
    assert planned(None, net).passes == 12
    whole, cut = (
        dataclasses.replace(planned(None, net), microbatch=size, saved_steps=2).parts["saved activations"]
        for size in (50, 7)
    )
    parameters = 2 * 8 * (8 - 1) * 4 * net.num_parameters  # a copy of them and their gradient, for each further piece
    assert whole < cut <= whole + 2 * parameters


@needs_proc
@pytest.mark.native
@pytest.mark.parametrize(
    "call",
    ["conv3x3(x, weight, 1)", "conv3x3_weight_gradient(wide, wide, 1)"],  # no room for results, and for workspace
)
def test_native_kernels_say_that_memory_ran_out(call: str) -> None:
    program = (
        "import resource, torch\n"
        "from mtt_fast import kernels\n"
        "x, weight = torch.randn(64, 3, 64, 64), torch.randn(64, 3, 3, 3)\n"
        "wide = torch.randn(1, 3, 1024, 512)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, -1))\n"
        f"try:\n    kernels.{call}\n"
        "except MemoryError:\n    print('out of memory')\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert answer.stdout == "out of memory\n"


def test_auto_is_most_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: 100 * MIB)
    assert planned("auto").budget == 80 * MIB
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: MIB)
    too_little = r"^`memory_budget` auto: expected at least \d+ MiB .*, found 1 MiB, 80% of the free memory; free memory, or lower"
    with pytest.raises(InputError, match=too_little):
        planned("auto")
