"""Any `nn.Module` with ConvNet's interface: a pure function of one flat parameter vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mtt_fast.errors import InputError
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.networks.module_checks import check_functions, check_kind, check_no_dropout, copy_of
from mtt_fast.networks.protocol import Network
from mtt_fast.networks.stateless import Stateless, with_the_same_tensors

Track = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of parameters (P,), a batch of inputs and running statistics (S,) that returns the statistics after the batch."""


class FlatModule:
    """A copy of `module`, called with its parameters as one vector `theta` (P,), in `module.parameters()` order.

    Buffers keep their current values, even if layers write into them. So do frozen parameters (`requires_grad=False` beside
    trainable ones, and integers), which are not part of `theta`. The copy keeps the module's mode: a batch norm in training mode
    uses batch statistics (and updates no running ones), so the loss is not a mean over independent samples and a batch cannot be
    cut into micro-batches; in evaluation mode it can. Running statistics, which torch keeps in buffers, are explicit:
    `statistics` has the initial ones, `track` updates them with a batch, and `evaluated` returns the network that uses them.

    May be called in several threads at once. Raises `InputError` for a module with active dropout, whose draws would differ
    between the two sweeps: torch's dropout layers, and layers with a `dropout`, such as attention and recurrent layers (`unroll`
    refuses modules that draw random numbers in other ways). Raises `InputError` also for a compiled module and `nn.EmbeddingBag`,
    which have no second derivative, for options of `nn.Embedding` whose second derivative is missing or wrong, and for a module
    that cannot be copied or called with other parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        check_kind(module)
        tracked = copy_of(module)
        check_no_dropout(tracked)
        everything = dict(tracked.named_parameters())
        trained = {name: value for name, value in everything.items() if value.requires_grad}
        if not trained:
            check_functions(module)
        parameters = trained or {name: value for name, value in everything.items() if value.is_floating_point()}
        self.layout = ParameterLayout(tuple(parameters), tuple(tuple(value.shape) for value in parameters.values()))
        norms = {name: part for name, part in tracked.named_modules() if isinstance(part, _NormBase)}
        self.mixes_samples = any(
            isinstance(part, _BatchNorm) and (part.training or part.running_mean is None) for part in norms.values()
        )
        """True if a sample's output depends on the others (batch statistics), so that a batch cannot be cut."""
        training = {name: part for name, part in norms.items() if part.training}
        running = {f"{name}.{key}": value for name, part in training.items() for key, value in part.named_buffers()}
        self._running = ParameterLayout(tuple(running), tuple(tuple(value.shape) for value in running.values()))
        self.statistics = _flat(running.values()) if running else None
        """The running statistics (S,) of batch and instance norms in training mode at the start: means, variances, counts. None if it has none."""
        self._initial = _one_vector(parameters.values())
        self._kind = type(module).__name__
        self._module = tracked
        self._trained = Stateless(_without_running_statistics(tracked))
        linear = [name for name, part in tracked.named_modules() if isinstance(part, nn.Linear) and name]
        self._features = self._inputs_of(linear[-1]) if linear else None
        self._tracked, self._tested = Stateless(tracked), Stateless(with_the_same_tensors(tracked).eval())

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters P."""
        return self.layout.num_parameters

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (P,) that the module had when it was wrapped; `generator` is ignored.

        For new parameters build a new module, since only its layers know their distribution.
        """
        return self._initial.clone()

    def describe(self) -> dict[str, Any]:
        """Return the description of the network, as a record."""
        return {"kind": self._kind}

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the module's output for `images` under the parameters `theta` (P,)."""
        return self._trained(self.layout.named(theta), images)

    def embed(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the inputs (n, F) of the module's last linear layer for `images`, in the module's own mode.

        Raises `InputError` for a module without a linear layer.
        """
        if self._features is None:
            raise InputError(f"embed: expected a network with a linear layer, found none in {self._kind}")
        return self._features(self.layout.named(theta), images)

    def _inputs_of(self, layer: str) -> Stateless:
        """Return the module up to the inputs of `layer`, in the module's own mode."""
        module = with_the_same_tensors(self._trained.module)
        module.set_submodule(layer, nn.Identity())
        return Stateless(module)

    @torch.no_grad()
    def track(self, theta: Tensor, images: Tensor, statistics: Tensor) -> Tensor:
        """Return the running `statistics` (S,) after a step on `images`, at `theta` (P,) before the step.

        They are what torch's norm layers compute in a forward pass in training mode: the batch's mean and unbiased variance,
        weighted by the layer's momentum. This costs a forward pass.
        """
        running = self._running.named(statistics.to(theta, copy=True))  # torch writes into these
        self._tracked(self.layout.named(theta) | running, images)
        return _flat(running.values())

    def evaluated(self, statistics: Tensor) -> Network:
        """Return the network in evaluation mode with the running `statistics` (S,), for a test."""
        return _Evaluated(self, statistics)


def statistics_of(network: Network) -> tuple[Tensor, ...]:
    """Return the running statistics at the start of a training of `network`: one vector (S,), or none if it keeps none."""
    return () if not isinstance(network, FlatModule) or network.statistics is None else (network.statistics,)


def track_of(network: Network) -> Track | None:
    """Return the function that updates the running statistics of `network` by a batch, or None if it keeps none."""
    return network.track if isinstance(network, FlatModule) and network.statistics is not None else None


def in_evaluation(network: Network, *statistics: Tensor) -> Network:
    """Return `network` for a test: in evaluation mode with its running `statistics`, if it keeps any."""
    return network.evaluated(*statistics) if isinstance(network, FlatModule) and statistics else network


@dataclass(frozen=True)
class _Evaluated:
    """A `FlatModule` in evaluation mode, with running statistics."""

    network: FlatModule
    statistics: Tensor
    mixes_samples: bool = False

    @property
    def num_parameters(self) -> int:
        return self.network.num_parameters

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        network = self.network
        running = network._running.named(self.statistics.to(theta))
        return network._tested(network.layout.named(theta) | running, images)


def _without_running_statistics(module: nn.Module) -> nn.Module:
    """Return a copy whose norms in training mode write no running statistics, which `torch.func` forbids."""
    module = with_the_same_tensors(module)
    for part in module.modules():
        if isinstance(part, _NormBase) and part.training:
            part.running_mean = part.running_var = part.num_batches_tracked = None
            part.track_running_stats = False
    return module


def _one_vector(parameters: Iterable[Tensor]) -> Tensor:
    """Return a copy of the `parameters` one after another. Raises `InputError` for those on several devices."""
    parts = [value.detach().reshape(-1) for value in parameters]
    if len(devices := {str(part.device) for part in parts}) > 1:
        raise InputError(
            f"FlatModule: expected parameters on one device, found {' and '.join(sorted(devices))}; move the module by .to(…)"
        )
    return torch.cat(parts)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return the tensors one after another in one new vector of the first one's dtype, so that counts become floating."""
    first, *rest = (tensor.detach().reshape(-1) for tensor in tensors)
    return torch.cat([first, *(tensor.to(first) for tensor in rest)])
