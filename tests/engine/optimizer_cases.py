"""Cases of student steps with an optimizer that has a state, the ways through `unroll`, and the comparison of all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import Adam, ConvNet, FlatModule, plan, unroll
from mtt_fast.engine.students.generic import cross_entropy
from mtt_fast.testing import assert_close, module_function, reference_convnet

SHAPE = (3, 4, 8, 5, 2)
NET, MODULE = ConvNet(*SHAPE), reference_convnet(*SHAPE)
ORACLE = module_function(MODULE)
STEPS = 5


class Case(NamedTuple):
    """The arguments of both sides, in float64."""

    start: Tensor
    velocity: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor

    def leaves(self) -> Case:
        return Case(*(value.clone().requires_grad_(value.is_floating_point()) for value in self))


def make(soft: bool = False, per_step: bool = True, dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    start, logits = NET.init(generator).to(dtype), randn(7, 4)
    labels = logits.softmax(1) if soft else logits.argmax(1)
    rates = 0.1 + 0.1 * torch.rand(STEPS, generator=generator).to(dtype)
    return Case(start, 0.3 * randn(len(start)), randn(7, 3, 8, 8), labels, rates if per_step else rates[0])


ADAM = Adam((0.8, 0.95), 1e-3, 0.05, steps=3)
"""A large ε makes the derivatives through √ŝ well conditioned; numbers of torch's defaults are compared in test_adam.py."""


def case_of_adam(dtype: torch.dtype = torch.float64, **options: Any) -> Case:
    """Return a case whose state are two moments (2, P), as a training leaves them."""
    case = make(dtype=dtype, **options)
    squares = (case.velocity + 0.1).square()
    return case._replace(velocity=torch.stack([0.1 * case.velocity, squares]), lr=case.lr / 10)


BATCHES = [torch.tensor(rows) for rows in ([0, 1, 2, 3], [4, 5], [6, 0, 0, 1, 2], [3, 4, 5], [6, 1])]


def _written_out(
    case: Case,
    step: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    weight_decay: float,
    *,
    network: Callable[[Tensor, Tensor], Tensor] = ORACLE,
    batches: Sequence[Tensor] = BATCHES,
    truncated: bool = False,
    augment: Any = None,
    draws: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return the path and the last state of recorded steps; `step(n, state, gradient)` returns the update and the next state."""
    theta, state, images, labels, lr = case
    path = [theta]
    for n, index in enumerate(batches):
        at = theta.detach().requires_grad_() if truncated else theta
        seen = images[index] if augment is None else augment(images[index], draws[n])
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(at, seen), labels[index]), at, create_graph=True)
        update, state = step(n, state, gradient + weight_decay * theta)
        theta = theta - (lr[n] if lr.dim() else lr) * update
        path.append(theta)
    return torch.stack(path), state


def sgd_written_out(case: Case, momentum: float, weight_decay: float, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the path and the last velocity of recorded steps as torch.optim.SGD's documentation writes them."""

    def step(n: int, velocity: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        velocity = momentum * velocity + gradient
        return velocity, velocity

    return _written_out(case, step, weight_decay, **options)


def adam_written_out(case: Case, adam: Adam, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the path and the last moments (2, P) of recorded steps as the paper's algorithm 1 writes them; √0 has the derivative 0."""
    beta1, beta2 = adam.betas

    def step(n: int, moments: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        mean = beta1 * moments[0] + (1 - beta1) * gradient
        square = beta2 * moments[1] + (1 - beta2) * gradient**2
        t = adam.steps + n + 1
        mean_hat, square_hat = mean / (1 - beta1**t), square / (1 - beta2**t)
        root = torch.where(square_hat > 0, torch.where(square_hat > 0, square_hat, 1).sqrt(), 0)
        return mean_hat / (root + adam.eps), torch.stack([mean, square])

    return _written_out(case, step, adam.weight_decay, **options)


@dataclass(frozen=True)
class Stateful:
    """An optimizer: the arguments by which `unroll` takes it, its steps written out, and a case with its state."""

    options: dict[str, Any]
    written_out: Callable[..., tuple[Tensor, Tensor]]
    case: Callable[..., Case]

    def later(self, steps: int) -> dict[str, Any]:
        """Return the options for a window that comes so many steps later."""
        adam = self.options.get("optimizer")
        return self.options if adam is None else {"optimizer": replace(adam, steps=adam.steps + steps)}


def stateful(name: str, weight_decay: float) -> Stateful:
    """Return the optimizer `name`; SGD alone has its last update as its state."""
    if name in ("SGD", "momentum"):
        momentum = 0.9 if name == "momentum" else 0.0
        options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay}
        return Stateful(options, partial(sgd_written_out, **options), make)
    adam = replace(ADAM if name == "Adam" else Adam(), weight_decay=weight_decay)
    return Stateful({"optimizer": adam}, partial(adam_written_out, adam=adam), case_of_adam)


def loss_of_all_rows(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a linear function of a path of `case` and of its last state."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(STEPS + 3, len(case.start), generator=generator, dtype=torch.float64)
    return lambda path, state: (weights[: STEPS + 1] * path).sum() + (weights[-2:] * state).sum()


def engines(name: str, *, weight_decay: float = 0.0, **optimizer: Any) -> tuple[Any, dict[str, Any]]:
    """Return a network and options of `unroll` that take another way through it; its plans are for this `optimizer`."""
    module = FlatModule(MODULE)
    shape: dict[str, Any] = {"images": (7, 3, 8, 8), "steps": STEPS, "batch": 5, "dtype": torch.float64, **optimizer}
    whole, of_module = plan(NET, memory_budget=None, **shape), plan(module, microbatch=2, **shape)
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "fused": (NET, {}),
        "generic": (NET, {"loss": cross_entropy}),
        "a module": (module, {}),
        "micro-batches": (NET, {"microbatch": 2}),
        "a module in micro-batches": (module, {"microbatch": 3}),
        "a budget": (NET, {"memory_budget": "1GiB"}),
        "saved activations": (NET, {"plan": replace(whole, saved_steps=2)}),
        "saved graphs": (module, {"plan": replace(of_module, saved_steps=3)}),
        "the path on the host": (NET, {"plan": replace(whole, path_on_host=True)}),
        "saved graphs, the path on the host": (module, {"plan": replace(of_module, saved_steps=3, path_on_host=True)}),
    }
    return ways[name]


ENGINES = (
    "fused", "generic", "a module", "micro-batches", "a module in micro-batches", "a budget", "saved activations",
    "saved graphs", "the path on the host", "saved graphs, the path on the host",
)  # fmt: skip


def unrolled(leaves: Case, net: Any = NET, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the path and the last state by `unroll`, beside `written_out` of the same leaves."""
    theta, state, images, labels, lr = leaves
    path, last = unroll(net, theta, images, labels, lr, BATCHES, velocity=state, return_velocity=True, **options)
    return path, last


def assert_same_gradients(case: Case, mine: Callable[[Case], Tensor], theirs: Callable[[Case], Tensor]) -> None:
    ours, expected = case.leaves(), case.leaves()
    names = [name for name in Case._fields if getattr(case, name).is_floating_point()]
    found, wanted = (
        torch.autograd.grad(value, [getattr(leaves, name) for name in names])
        for value, leaves in ((mine(ours), ours), (theirs(expected), expected))
    )
    for name, one, other in zip(names, found, wanted, strict=True):
        assert_close(name, one, other, 1e-9)
