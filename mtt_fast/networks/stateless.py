"""Call a module as a pure function of its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtt_fast.errors import InputError


class _Absent(Tensor):
    """The placeholder for a layer's tensor between calls: a backward pass that reads the layer again would find wrong values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise InputError(
            "FlatModule: expected a module that reads its parameters and buffers only in its forward pass, found one that reads them "
            "again in the backward pass, as torch.utils.checkpoint does; take the checkpoint out, and save memory by "
            "`microbatch` or `memory_budget`"
        )


class Stateless:
    """A module as a pure function of its parameters, and of any buffers that are passed.

    `functional_call` puts tensors into the module while it runs, so each concurrent call has its own copy of the layers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # each tensor once, by its first name: a buffer may be a parameter, too
        names: dict[Tensor, str] = {}
        self._tied: dict[str, str] = {}  # first names, by the other ones
        for name, value in _named_tensors(module):
            if names.setdefault(value, name) != name:
                self._tied[name] = names[value]
        self._own = {name: value for value, name in names.items()}
        self._idle: list[nn.Module] = []
        self._on_devices: dict[tuple[str, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_idle": [], "_on_devices": {}}

    def __call__(self, tensors: dict[str, Tensor], images: Tensor) -> Tensor:
        """Return the module's output for `images`, with `tensors` in place of its own of the same names."""
        like = next(iter(tensors.values()))
        # copies, since a layer may write into its buffers, and each call must start from the same values
        constants = {
            name: self._on_device_of(name, value, like).to(
                like.device, like.dtype if value.is_floating_point() else value.dtype, copy=True
            )
            for name, value in self._own.items()
            if name not in tensors
        }
        everything = tensors | constants
        # tied names are resolved here: `functional_call` would search for them in each call, and would not restore a layer used twice
        everything = {name: everything[first] for name, first in self._tied.items()} | everything
        if torch.compiler.is_compiling():  # it traces the call, and puts nothing into the module
            output = functional_call(self.module, everything, (images,), tie_weights=False)
        else:
            output = self._called(everything, images)
        if not isinstance(output, Tensor):
            raise InputError(
                f"FlatModule: expected the module to return logits, found {type(output).__name__}; return one tensor (b, …), such as "
                "torch.cat of several, which a `loss` splits again"
            )
        return output

    def _on_device_of(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """Return `value` on the device of `like`, cached, since a copy from the host synchronises and cannot be captured in a CUDA graph.

        For a meta tensor `like`, return it on its own device, so that the memory count has only one copy.
        """
        if value.device == like.device or like.is_meta:
            return value.detach()
        place = name, like.device
        if place not in self._on_devices:
            # the tensors of a transform end with it, and autograd cannot save those of `torch.inference_mode`
            with torch._C._DisableFuncTorch(), torch.inference_mode(False):
                self._on_devices[place] = value.detach().to(like.device)
        return self._on_devices[place]

    def _called(self, tensors: dict[str, Tensor], images: Tensor) -> Any:
        if images.is_meta:
            # in layers of its own, since a layer may keep what it computes in its first call, such as positions
            return functional_call(_without_tensors(self.module), tensors, (images,), tie_weights=False)
        try:
            module = self._idle.pop()  # atomic, as is append
        except IndexError:
            module = _without_tensors(self.module)
        try:
            return functional_call(module, tensors, (images,), tie_weights=False)
        finally:
            self._idle.append(module)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and then the buffers, under each of their names; a layer that is used twice appears once."""
    for name, part in module.named_modules():
        yield from part.named_parameters(name, recurse=False, remove_duplicate=False)
    for name, part in module.named_modules():
        yield from part.named_buffers(name, recurse=False, remove_duplicate=False)


def with_the_same_tensors(module: nn.Module) -> nn.Module:
    """Return a copy of the layers, which shares the parameters and buffers."""
    own = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in own})


def _without_tensors(module: nn.Module) -> nn.Module:
    """Return a copy of the layers without their tensors, for `functional_call`."""
    module = with_the_same_tensors(module)
    absent = torch.empty(0, device="cpu").as_subclass(_Absent)
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoder):
            # without a gradient nested tensors would change shapes, and values at masked positions
            part.use_nested_tensor = False
        for tensors in cast(tuple[dict[str, Tensor | None], ...], (part._parameters, part._buffers)):
            tensors.update({name: absent for name, value in tensors.items() if value is not None})
    return module
