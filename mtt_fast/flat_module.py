"""Any `nn.Module` behind ConvNet's interface: a pure function of one flat parameter vector."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_

from mtt_fast.errors import InputError
from mtt_fast.layout import ParameterLayout


class FlatModule:
    """A copy of `module`, called with its parameters as one vector `theta` (P,), in `module.parameters()` order.

    Buffers keep the values they have now. The copy keeps the module's mode:
    a batch norm in training mode uses batch statistics (and updates no running ones), so the loss is no longer a mean
    over independent samples and a batch cannot be cut into micro-batches; in evaluation mode it can.

    Raises `InputError` for a module with active dropout: its draws would differ between the two sweeps.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = copy.deepcopy(module)
        for name, part in self._module.named_modules():
            if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
                raise InputError(
                    f"FlatModule: layer {name or type(part).__name__} draws random numbers in training mode, so the backward "
                    "sweep would not repeat the forward one; set its p to 0, or call .eval()"
                )
        parameters = dict(self._module.named_parameters())
        self.layout = ParameterLayout(tuple(parameters), tuple(tuple(value.shape) for value in parameters.values()))
        self.mixes_samples = any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None)
            for part in self._module.modules()
        )
        """True where a sample's output depends on the others (batch statistics): no micro-batches then."""
        if self.mixes_samples:
            replace_all_batch_norm_modules_(self._module)
        self._initial = nn.utils.parameters_to_vector(parameters.values()).detach().clone()

    @property
    def num_parameters(self) -> int:
        """P."""
        return self.layout.num_parameters

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (P,) that the module had when it was wrapped, whatever the `generator`.

        For fresh ones, build a fresh module: only it knows how its layers are drawn.
        """
        return self._initial.clone()

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the module's output for `images` under the parameters `theta` (P,)."""
        parameters = dict(zip(self.layout.names, self.layout.split(theta), strict=True))
        buffers = {
            name: buffer.to(theta) if buffer.is_floating_point() else buffer.to(theta.device)
            for name, buffer in self._module.named_buffers()
        }
        output = functional_call(self._module, parameters | buffers, (images,))
        if not isinstance(output, Tensor):
            raise InputError(f"FlatModule: expected the module to return logits, found {type(output).__name__}")
        return output
