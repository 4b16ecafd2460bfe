"""Compute each image by a small network of its own, a neural field (DDiF).

D. Shin, H. Bae, G. Sim, W. Kang, I.-C. Moon, "Distilling Dataset into Neural Field", ICLR 2025. A field maps the coordinates of a pixel to
its values, by layers of sines (SIREN). It has fewer numbers than an image has pixels, so the same storage holds more images.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mtt_fast.errors import InputError
from mtt_fast.parametrisations.parametrisation import Parametrisation, block_size, check_whole
from mtt_fast.runtime.interrupts import raise_if_stopped, stop_request


class Ddif(Parametrisation):
    """DDiF's images. The options have the names of its code, where the learning rate `lr_nf` is --lr_img.

    A field has `num_layers` layers of `layer_size` sines, of frequencies `w0_initial` and `w0`, and a linear layer. At the start of a run
    the fields are fitted to the initial images by `epochs_init` steps of Adam with the learning rate `lr_nf_init`.
    """

    optimizer = "adam"

    def __init__(
        self,
        images: Tensor,
        num_classes: int,
        *,
        num_layers: int,
        layer_size: int,
        w0_initial: float = 30.0,
        w0: float = 10.0,
        epochs_init: int = 5000,
        lr_nf_init: float = 5e-4,
    ) -> None:
        super().__init__()
        check_whole("ddif", num_layers=num_layers, layer_size=layer_size)
        check_whole("ddif", 0, epochs_init=epochs_init)
        if not 0 < lr_nf_init < math.inf:
            raise InputError(
                f"`parametrisation` ddif: lr_nf_init {lr_nf_init}: expected a finite number above 0, such as 5e-4"
            )
        count, channels, *sides = images.shape
        sizes = [2, *[layer_size] * num_layers, channels]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for place, (inputs, outputs) in enumerate(pairwise(sizes)):
            bound = math.sqrt(6 / inputs) / w0 if place else 1 / inputs
            self.weights.append(torch.empty(count, outputs, inputs).uniform_(-bound, bound))
            self.biases.append(torch.empty(count, outputs).uniform_(-bound, bound))
        self.coordinates: Tensor
        axes = [torch.linspace(-1, 1, side) for side in sides]
        self.register_buffer("coordinates", torch.cartesian_prod(*axes), persistent=False)
        self._sides, self._frequencies = sides, [w0_initial, *[w0] * (num_layers - 1)]
        self._epochs_init, self._lr_nf_init = epochs_init, lr_nf_init

    def forward(self, index: Tensor) -> Tensor:
        """See `Parametrisation.forward`."""
        return self._images([each[index] for each in self.weights], [each[index] for each in self.biases])

    def fit(self, images: Tensor) -> None:
        """Fit the field of each image to it, in squared error. Raises `Stopped` on Ctrl-C or SIGTERM."""
        count, block = len(images), block_size(images)
        with (
            stop_request() as stop,
            tqdm(total=-(-count // block) * self._epochs_init, desc="fit fields", unit="step") as bar,
        ):
            for some in torch.arange(count, device=images.device).split(block):
                fields = [each.detach()[some].requires_grad_() for each in self.parameters()]
                optimizer = torch.optim.Adam(fields, lr=self._lr_nf_init)
                weights, biases = fields[: len(self.weights)], fields[len(self.weights) :]
                for _ in range(self._epochs_init):
                    raise_if_stopped(stop, "stopped while the fields were fitted; the same command continues")
                    optimizer.zero_grad()
                    # of each field the mean over its pixels, as if it were fitted alone
                    (self._images(weights, biases) - images[some]).square().mean((1, 2, 3)).sum().backward()
                    optimizer.step()
                    bar.update()
                with torch.no_grad():
                    for parameter, fitted in zip(self.parameters(), fields, strict=True):
                        parameter[some] = fitted

    def _images(self, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Return the images (k, C, H, W) of the fields with these `weights` (k, outputs, inputs) and `biases` (k, outputs)."""
        values = self.coordinates.expand(len(weights[0]), -1, -1)
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            values = torch.baddbmm(bias[:, None], values, weight.mT)
            if place < len(self._frequencies):
                values = torch.sin(self._frequencies[place] * values)
        return values.mT.reshape(len(values), -1, *self._sides)
