"""Compare whole iterations with those that the public codes of SPEED and DDiF computed (public_code/README.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtt_fast.distill.gradients import finish_gradients, iteration_of, start_gradients
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.planning import plan_steps
from mtt_fast.distill.updates import apply_gradients
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.parametrisations.ddif import Ddif
from mtt_fast.parametrisations.parametrisation import Parametrisation, images_at, learned_values
from mtt_fast.parametrisations.speed import Speed
from mtt_fast.storage.checkpoint import State
from mtt_fast.testing import assert_close
from tests.distill.public_cases import CASES, IPC, experts, segment

NAMES = {
    "projection": "mhsc.proj",
    "last_norm": "norm2",
    "norm": "norm1",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
"""The modules of a block here, and in SPEED's code."""


def name_in_code(name: str) -> str:
    """Return the name of a parameter in the record."""
    if name in ("saet", "scm"):
        return name
    if name.startswith("to_pixels."):
        return f"freenet.decoder_pred.{name.removeprefix('to_pixels.')}"
    _, number, *module, kind = name.split(".")
    return f"freenet.decoder_blocks.{number}.{NAMES['.'.join(module)]}.{kind}"


def after(name: str) -> str:
    """Return the name of a parameter in the record after the last iteration."""
    return f"{name}_2" if name in ("saet", "scm") else name_in_code(name).replace("freenet.", "freenet_2.")


def speed(case: dict[str, Tensor]) -> tuple[Speed, dict[str, Tensor]]:
    """Return SPEED's parametrisation and the first parameters of the case, in float64."""
    module = Speed(
        torch.zeros(3 * IPC, 3, 8, 8), 3, num_saet=5, dim_saet=8, num_head=2, decoder_depth=2, top_k=6, l1_weight=1e-3,
        saet_rate=0.2, freenet_rate=0.05,
    ).double()  # fmt: skip
    first = {name: case[name_in_code(name)].double().view_as(each) for name, each in module.named_parameters()}
    return module, first


def ddif(case: dict[str, Tensor], group: str = "nf") -> tuple[Ddif, dict[str, Tensor]]:
    """Return DDiF's parametrisation and the parameters of a `group` of the case, in float64."""
    module = Ddif(
        torch.zeros(3 * IPC, 3, 8, 8), 3, num_layers=2, layer_size=5, epochs_init=20, lr_nf_init=5e-3
    ).double()
    axis = torch.linspace(-1, 1, 8, dtype=torch.float64)
    module.coordinates = torch.cartesian_prod(axis, axis)  # not rounded to float32
    layers, kinds = ("net.0", "net.1", "last_layer"), {"weights": "weight", "biases": "bias"}
    return module, {
        f"{ours}.{place}": case[f"{group}.{layer}.linear.{theirs}"].double()
        for ours, theirs in kinds.items()
        for place, layer in enumerate(layers)
    }


def iterate(
    case: dict[str, Tensor],
    options: DistillOptions,
    module: Parametrisation,
    parameters: dict[str, Tensor],
    rate: float,
    folder: Path,
) -> Iterator[tuple[float, State]]:
    """Yield the loss and the state after each of three iterations with what the code drew. `parameters` are updated."""
    images = images_at(module, parameters, torch.zeros(3 * IPC, 3, 8, 8, dtype=torch.float64))
    lr = torch.tensor(rate, dtype=torch.float64)
    velocity, square = ({name: torch.zeros_like(each) for name, each in parameters.items()} for _ in range(2))
    state = State(
        0, 1, images, torch.arange(3).repeat_interleave(IPC), lr, None, torch.zeros_like(lr), parameters=parameters,
        parameters_velocity=velocity, parameters_square=square if module.optimizer == "adam" else None,
    )  # fmt: skip
    network, store = network_by_name("ConvNetD1W4", (3, 8, 8), 3), experts(case, folder)
    plan = plan_steps(options, network, images.shape, torch.device("cpu"), "fp32")
    plan = dataclasses.replace(plan, work=dataclasses.replace(plan.work, dtype=torch.float64))
    for number in range(3):
        segments = [segment(case | {"images": images}, number, store)]
        pending = start_gradients(state, segments, plan, partial(iteration_of, options, network))
        loss, gradients, *_ = finish_gradients(state, pending)
        apply_gradients(options, state, segments, loss, gradients, module)
        yield loss, state


def test_iterations_are_those_of_speeds_code(tmp_path: Path) -> None:
    case = load_file(CASES / "speed.safetensors")
    options = DistillOptions(
        ipc=IPC, syn_steps=6, batch_syn=5, student_mom=0.9, student_dampening=0.9, mom_img=0.95, lr_img=1.0, lr_lr=0.005,
        parametrisation="speed",
    )  # fmt: skip
    module, parameters = speed(case)
    first = {name: each.clone() for name, each in parameters.items()}
    for number, (loss, state) in enumerate(iterate(case, options, module, parameters, 0.2, tmp_path)):
        assert loss == pytest.approx(case[f"loss_{number}"].item(), rel=1e-10)
        if (
            number < 2
        ):  # in the third the code sets a rate that became negative to 0.001, which here stays (docs/methods.md)
            assert state.lr.item() == pytest.approx(case[f"lr_{number}"].item(), rel=1e-10)
    for name, values in parameters.items():
        expected = case[after(name)].view_as(values)
        assert_close(f"change of {name}", values - first[name], expected - first[name], 1e-10)
    assert_close("images", state.images, case["images_2"], 1e-10)
    evaluated = images_at(module, parameters, torch.empty_like(state.images), evaluated=True)
    assert_close("evaluated images", evaluated, case["evaluated_2"], 1e-10)


def test_iterations_are_those_of_ddifs_code(tmp_path: Path) -> None:
    case = load_file(CASES / "ddif.safetensors")
    options = DistillOptions(ipc=IPC, syn_steps=6, batch_syn=5, lr_img=1e-2, lr_lr=3e-4, parametrisation="ddif")
    module, parameters = ddif(case)
    first = {name: each.clone() for name, each in parameters.items()}
    for number, (loss, state) in enumerate(iterate(case, options, module, parameters, 0.05, tmp_path)):
        assert loss == pytest.approx(case[f"loss_{number}"].item(), rel=1e-10)
        assert state.lr.item() == pytest.approx(case[f"lr_{number}"].item(), rel=1e-10)
    _, expected = ddif(case, "nf_2")
    for name, values in parameters.items():
        assert_close(f"change of {name}", values - first[name], expected[name] - first[name], 1e-10)
    assert_close("images", state.images, case["images_2"], 1e-10)


def test_fields_are_fitted_as_by_ddifs_code() -> None:
    case = load_file(CASES / "ddif.safetensors")
    module, first = ddif(case)
    images_at(module, first, torch.empty(3 * IPC, 3, 8, 8, dtype=torch.float64))
    module.fit(case["fit_images"].double())
    _, expected = ddif(case, "fitted")
    for name, values in learned_values(module).items():
        assert_close(f"change of {name}", values - first[name], expected[name] - first[name], 1e-10)
