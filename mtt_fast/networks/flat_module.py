"""Any `nn.Module` with ConvNet's interface: a pure function of one flat parameter vector."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from mtt_fast.errors import InputError
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.networks.protocol import Network

Track = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From parameters (P,), a batch of inputs, and running statistics (S,) to the statistics after the batch."""


class FlatModule:
    """A copy of `module`, called with its parameters as one vector `theta` (P,), in `module.parameters()` order.

    Buffers keep the values that they have now, even if layers write into them. So do frozen parameters (those with
    `requires_grad` False beside others, and whole numbers), which are not part of `theta`. The copy keeps the module's
    mode: a batch norm in training mode uses batch statistics (and updates no running ones), so the loss is not a mean
    over independent samples and a batch cannot be cut into micro-batches; in evaluation mode it can.
    The running statistics that `torch` keeps in buffers are explicit: `statistics` are those at the start, `track` updates
    them by a batch, and `evaluated` tests with them.

    May be called in several threads at once. Raises `InputError` for a module with active dropout: its draws would
    differ between the two sweeps. Torch's dropout layers are detected, and layers with a `dropout`, such as
    attention and recurrent layers; `unroll` refuses a module that draws random numbers in another way. Refused as well are a compiled
    module and `nn.EmbeddingBag`, which have no second derivative, options of `nn.Embedding` that have none or a wrong one,
    and a module that cannot be copied or called with other parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        _check_kind(module)
        tracked = _copy_of(module)
        for name, part in tracked.named_modules():
            if part.training and _dropout_probability(part) > 0:
                raise InputError(
                    f"FlatModule: layer {name or type(part).__name__} draws random numbers in training mode, so the backward "
                    "sweep would not repeat the forward one; set its probability to 0, or call .eval()"
                )
        everything = dict(tracked.named_parameters())
        trained = {name: value for name, value in everything.items() if value.requires_grad}
        parameters = trained or {name: value for name, value in everything.items() if value.is_floating_point()}
        self.layout = ParameterLayout(tuple(parameters), tuple(tuple(value.shape) for value in parameters.values()))
        norms = {name: part for name, part in tracked.named_modules() if isinstance(part, _BatchNorm)}
        mixing = {name: part for name, part in norms.items() if part.training or part.running_mean is None}
        self.mixes_samples = bool(mixing)
        """True where a sample's output depends on the others (batch statistics): no micro-batches then."""
        running = {f"{name}.{key}": value for name, part in mixing.items() for key, value in part.named_buffers()}
        self._running = ParameterLayout(tuple(running), tuple(tuple(value.shape) for value in running.values()))
        self.statistics = _flat(running.values()) if running else None
        """The running statistics (S,) of batch norms in training mode at the start: means, variances, counts. None if it has none."""
        self._initial = _one_vector(parameters.values())
        self._kind = type(module).__name__
        self._module = tracked
        self._trained = _Stateless(_without_running_statistics(tracked))
        features = _without_last_linear(self._trained.module)
        self._features = None if features is None else _Stateless(features)
        self._tracked, self._tested = _Stateless(tracked), _Stateless(_with_the_same_tensors(tracked).eval())

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters P."""
        return self.layout.num_parameters

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (P,) that the module had when it was wrapped, whatever the `generator`.

        For fresh parameters, build a fresh module: only its layers know their distribution.
        """
        return self._initial.clone()

    def describe(self) -> dict[str, Any]:
        """Return the description of the network, as a record."""
        return {"kind": self._kind}

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the module's output for `images` under the parameters `theta` (P,)."""
        return self._trained(self._parameters(theta), images)

    def embed(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the inputs (n, F) of the module's last linear layer for `images`, in the module's own mode.

        Raises `InputError` for a module without a linear layer.
        """
        if self._features is None:
            raise InputError(f"embed: expected a network with a linear layer, found none in {self._kind}")
        return self._features(self._parameters(theta), images)

    @torch.no_grad()
    def track(self, theta: Tensor, images: Tensor, statistics: Tensor) -> Tensor:
        """Return the running `statistics` (S,) after a step on `images`, at `theta` (P,) before the step.

        They are those of `torch` after a forward pass in training mode: mean and unbiased variance of the batch enter with
        the weight of the layer's momentum. The cost is a forward pass.
        """
        running = self._statistics(statistics.to(theta, copy=True))  # torch writes into these
        self._tracked(self._parameters(theta) | running, images)
        return _flat(running.values())

    def evaluated(self, statistics: Tensor) -> Network:
        """Return the network in evaluation mode with the running `statistics` (S,), for a test."""
        return _Evaluated(self, statistics)

    def _parameters(self, theta: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layout.names, self.layout.split(theta), strict=True))

    def _statistics(self, statistics: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._running.names, self._running.split(statistics), strict=True))


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
        return network._tested(network._parameters(theta) | network._statistics(self.statistics.to(theta)), images)


class _Absent(Tensor):
    """The place of a layer's tensor between calls. A backward pass that reads the layer again would find other values there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InputError(
            "FlatModule: expected a module that reads its parameters and buffers only in its forward pass, found one that reads them "
            "again in the backward pass, as torch.utils.checkpoint does; take the checkpoint out, and save memory by "
            "`microbatch` or `memory_budget`"
        )


class _Stateless:
    """A module as a pure function of its parameters, and of the buffers that are given.

    `functional_call` puts tensors into the module while it runs, so each call has a copy of the layers to itself.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # each tensor once: a buffer may be a parameter, too
        names: dict[Tensor, str] = {}
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            names.setdefault(value, name)
        self._own = {name: value for value, name in names.items()}
        self._idle: list[nn.Module] = []
        self._on_devices: dict[tuple[str, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_idle": [], "_on_devices": {}}

    def __call__(self, tensors: dict[str, Tensor], images: Tensor) -> Tensor:
        like = next(iter(tensors.values()))
        # copies, since a layer may write into its buffers, and the next call has to find what this one found
        constants = {
            name: self._near(name, value, like).to(like.dtype if value.is_floating_point() else value.dtype, copy=True)
            for name, value in self._own.items()
            if name not in tensors
        }
        if torch.compiler.is_compiling():  # it traces the call, and puts nothing into the module
            output = functional_call(self.module, tensors | constants, (images,))
        else:
            output = self._called(tensors | constants, images)
        if not isinstance(output, Tensor):
            raise InputError(
                f"FlatModule: expected the module to return logits, found {type(output).__name__}; return one tensor (b, …), such as "
                "torch.cat of several, which a `loss` splits again"
            )
        return output

    def _near(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """Return `value` on the device of `like`. It is kept there, since a copy from the host synchronises, and cannot be captured in a CUDA graph."""
        if value.device == like.device or like.is_meta:
            return value.detach().to(like.device)
        place = name, like.device
        if place not in self._on_devices:
            with torch._C._DisableFuncTorch():  # the tensors of a transform end with it
                self._on_devices[place] = value.detach().to(like.device)
        return self._on_devices[place]

    def _called(self, tensors: dict[str, Tensor], images: Tensor) -> Any:
        try:
            module = self._idle.pop()  # atomic, as is append
        except IndexError:
            module = _without_tensors(self.module)
        try:
            return functional_call(module, tensors, (images,))
        finally:
            self._idle.append(module)


def _check_kind(module: nn.Module) -> None:
    """Raise `InputError` for what a pure function with two derivatives cannot be made of."""
    if not isinstance(module, nn.Module):
        raise InputError(f"FlatModule: expected a torch.nn.Module, found {type(module).__name__}")
    for name, part in module.named_modules():
        where = f"layer {name}" if name else "the module"
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            raise InputError(
                f"FlatModule: {where} is compiled, so it has no second derivative; wrap it before torch.compile"
            )
        if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise InputError(f"FlatModule: {where} is {type(part).__name__}, one copy a device; wrap its .module")
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(f"FlatModule: {where} is compiled by torch.jit; wrap the module that it was made from")
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and (problem := _problem_of_embedding(part)):
            raise InputError(f"FlatModule: {where} is nn.{type(part).__name__}{problem}")
    if not any(value.is_floating_point() or value.is_complex() for value in module.parameters()):
        raise InputError(f"FlatModule: expected a module with parameters, found {type(module).__name__} without any")
    if complex_ones := [name for name, value in module.named_parameters() if value.is_complex()]:
        raise InputError(
            f"FlatModule: expected real parameters, found {complex_ones[0]} complex; keep it as real numbers, and take "
            "torch.view_as_complex of them in the forward pass"
        )
    if hooked := [name for name, value in module.named_parameters() if value._backward_hooks]:
        raise InputError(
            f"FlatModule: parameter {hooked[0]} has a hook on its gradient, which would not be called; remove it, and do in the forward "
            "pass what it does"
        )
    if any(nn.parameter.is_lazy(value) for value in module.parameters()):
        raise InputError(
            "FlatModule: expected a module that knows its sizes, found a lazy layer before its first call; call the module once"
        )


def _problem_of_embedding(part: nn.Embedding | nn.EmbeddingBag) -> str | None:
    """Return why the second derivative of an embedding fails or is wrong in torch, and how to fix it; None if it is right."""
    if not part.weight.requires_grad:
        return None
    if isinstance(part, nn.EmbeddingBag):
        return ", which has no second derivative in torch; use nn.Embedding, and .mean(1), .sum(1) or .amax(1) of its result"
    if part.sparse:
        return "(sparse=True), whose gradient does not fit into a vector of all parameters; use sparse=False"
    if part.max_norm is not None:
        return (
            "(max_norm=…), which overwrites its weights in the forward pass; leave max_norm out, and scale the looked-up vectors, as "
            "torch.renorm does"
        )
    if part.scale_grad_by_freq:
        return "(scale_grad_by_freq=True), whose second derivative in torch leaves the scale out; use scale_grad_by_freq=False"
    return None


def _copy_of(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        if computed := _computed_tensor(module):
            raise InputError(
                f"FlatModule: expected a module that computes {computed} in its forward pass, found one that keeps it, with its graph; "
                "after torch.nn.utils.prune call its remove, for weight_norm and spectral_norm take those of "
                "torch.nn.utils.parametrizations"
            ) from error
        reason = str(error).split(chr(10))[0]
        raise InputError(
            f"FlatModule: expected a module that copy.deepcopy copies, found {type(module).__name__}: {reason}; take out what cannot be "
            "copied"
        ) from error


def _computed_tensor(module: nn.Module) -> str | None:
    """Return the name of a tensor in `module` that was computed from others, and so cannot be copied; None if there is none."""
    for name, part in module.named_modules():
        for attribute, value in (vars(part) | part._buffers).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                return f"{name}.{attribute}".removeprefix(".")
    return None


def _dropout_probability(part: nn.Module) -> float:
    """Return the probability with which a layer drops values in training mode."""
    share = part.p if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", 0)
    return share if isinstance(share, (int, float)) else 0


def _with_the_same_tensors(module: nn.Module) -> nn.Module:
    """Return a copy of the layers, which shares the parameters and buffers."""
    own = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in own})


def _without_tensors(module: nn.Module) -> nn.Module:
    """Return a copy of the layers without their tensors, for `functional_call`. Tied parameters stay tied."""
    module = _with_the_same_tensors(module)
    absent: defaultdict[Tensor, Tensor] = defaultdict(lambda: torch.empty(0, device="cpu").as_subclass(_Absent))
    for part in module.modules():
        for tensors in cast(tuple[dict[str, Tensor | None], ...], (part._parameters, part._buffers)):
            tensors.update({name: absent[value] for name, value in tensors.items() if value is not None})
    return module


def _without_running_statistics(module: nn.Module) -> nn.Module:
    """Return a copy whose batch norms in training mode write no running statistics, which `torch.func` forbids."""
    module = _with_the_same_tensors(module)
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.training:
            part.running_mean = part.running_var = part.num_batches_tracked = None
            part.track_running_stats = False
    return module


def _without_last_linear(module: nn.Module) -> nn.Module | None:
    """Return a copy that returns the inputs of the last linear layer, or None if there is no such layer."""
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and name]
    if not names:
        return None
    module = _with_the_same_tensors(module)
    module.set_submodule(names[-1], nn.Identity())
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
