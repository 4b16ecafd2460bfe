"""Compute images by sparse combinations of a few learned tokens (SPEED).

X. Wei, A. Cao, F. Yang, Z. Ma, "Sparse Parameterization for Epitomic Dataset Distillation", NeurIPS 2023. The patches of all images are
combinations of the same tokens, with coefficients that are sparse. A small network, with few blocks, turns the combinations into
pixels. So the same number of stored numbers holds many more images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtt_fast.errors import InputError
from mtt_fast.parametrisations.parametrisation import Parametrisation, check_whole

_STD = 0.2  # of the initial tokens and coefficients


class Speed(Parametrisation):
    """SPEED's images. The options have the names of its code, where `num_scm` is --ipc, and `lr_scm` is --lr_img.

    `num_saet` K tokens of `dim_saet` D numbers, and for each image, head and patch K coefficients (K is `num_saet`). The network has
    `decoder_depth` blocks. Evaluated are images of the `top_k` largest coefficients of each image and head; the others are zero. The
    penalty is `l1_weight` Σ |coefficient|. Rates of tokens and network are multiples of that of the coefficients.
    """

    def __init__(
        self,
        images: Tensor,
        num_classes: int,
        *,
        num_saet: int,
        dim_saet: int,
        num_head: int,
        decoder_depth: int,
        top_k: int,
        l1_weight: float,
        patch_size: int = 4,
        saet_rate: float = 0.1,
        freenet_rate: float = 1e-4,
    ) -> None:
        super().__init__()
        check_whole(
            "speed", num_saet=num_saet, dim_saet=dim_saet, num_head=num_head, decoder_depth=decoder_depth, top_k=top_k,
            patch_size=patch_size,
        )  # fmt: skip
        count, channels, height, width = images.shape
        if height % patch_size or width % patch_size:
            raise InputError(
                f"`parametrisation` speed: patch_size {patch_size}: expected a divisor of height and width, {height} and {width}"
            )
        if dim_saet % num_head:
            raise InputError(
                f"`parametrisation` speed: dim_saet {dim_saet}: expected a multiple of num_head {num_head}"
            )
        rows, columns = height // patch_size, width // patch_size
        if top_k > rows * columns * num_saet:
            raise InputError(
                f"`parametrisation` speed: top_k {top_k}: expected 1 to {rows * columns * num_saet}, the coefficients of an image "
                "and head"
            )
        self.saet = nn.Parameter(_STD * torch.randn(num_saet, dim_saet))
        self.scm = nn.Parameter(_STD * torch.randn(count, num_head, rows * columns, num_saet))
        self.blocks = nn.ModuleList(_Block(dim_saet) for _ in range(decoder_depth))
        self.to_pixels = _linear(dim_saet, patch_size**2 * channels)
        self._top_k, self._l1_weight = top_k, l1_weight
        self._rates, self._freenet_rate = {"saet": saet_rate, "scm": 1.0}, freenet_rate
        self._grid = rows, columns, patch_size

    def forward(self, index: Tensor) -> Tensor:
        """See `Parametrisation.forward`."""
        coefficients = self.scm[index]
        if not self.training:
            coefficients = _largest(coefficients, self._top_k)
        count, heads, patches, tokens = coefficients.shape
        mixed = coefficients @ self.saet.view(tokens, heads, -1).transpose(0, 1)
        mixed = mixed.transpose(1, 2).reshape(count, patches, -1)
        features = torch.zeros_like(mixed)
        for block in self.blocks:
            features = block(mixed, features)
        rows, columns, side = self._grid
        pixels: Tensor = self.to_pixels(features).view(count, rows, columns, side, side, -1)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(count, -1, rows * side, columns * side)

    def relative_rate(self, name: str) -> float:
        """See `Parametrisation.relative_rate`."""
        return self._rates.get(name, self._freenet_rate)

    def penalty(self) -> Tensor:
        """See `Parametrisation.penalty`."""
        return self._l1_weight * self.scm.abs().sum()

    def stored_numbers(self) -> int:
        """Return the numbers of tokens and network, and 1.5 for each coefficient that is not zero, with its place in 16 bits."""
        coefficients = self._top_k * self.scm[:, :, 0, 0].numel()
        return super().stored_numbers() - self.scm.numel() + 3 * coefficients // 2


class _Block(nn.Module):
    """A block of SPEED's network: every block sees the combinations of tokens again."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = _linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(_linear(dim, dim), nn.GELU(), _linear(dim, dim))
        self.last_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, mixed: Tensor, features: Tensor) -> Tensor:
        """Return the features after the block, all (n, patches, D), from the combinations `mixed` and the features before it."""
        features = self.norm(features + self.projection(mixed))
        result: Tensor = self.last_norm(features + self.mlp(features))
        return result


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _largest(coefficients: Tensor, count: int) -> Tensor:
    """Return `coefficients` (n, heads, patches, tokens) with zeros for all but the `count` of largest magnitude of an image and head."""
    flat = coefficients.flatten(2)
    smallest = flat.abs().topk(count).values[..., -1:]
    return flat.where(flat.abs() >= smallest, 0).view_as(coefficients)
