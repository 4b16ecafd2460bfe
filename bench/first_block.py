"""Time the first block in three ways: in parts; without its planes, if a back end has kernels for that; and a lower bound of the latter.

The lower bound is the time of only the matrix products of the block without planes (docs/adjoint.md), by torch, one sample at a
time, so that their results stay in the cache. ReLU, pooling, masks and everything else would come on top. A CPU has no kernels for
the block without planes; the bound shows what they could gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measuring import interleaved, seconds, set_precision
from bench.parsing import CommonOptions
from bench.records import publish
from bench.settings import BatchShape, Setting
from mtt_fast import kernels
from mtt_fast.engine.students.fused_blocks import EPILOGUES, Block, ImageBlock, Parameters, PlaneBlock
from mtt_fast.kernels import ConvLayer, plane_dtype


@dataclass(frozen=True)
class Options(CommonOptions, BatchShape):
    """Time the first block in parts, without its planes, and only the matrix products of the latter."""

    precision: str = "tf32"
    """precision of a GPU's products: tf32, bf16 or fp32"""


def main(options: Options, command: str) -> None:
    """Measure, print the table, write the record."""
    device, setting = options.torch_device(), options.resolve()
    set_precision(device, options.precision)
    precision: Any = options.precision if device.type == "cuda" else "fp32"
    runs = _runs(setting, device, precision)
    rows: dict[str, dict[str, Any]] = {
        name: dict(zip(("sweep", "way"), name.split(", "), strict=True)) | {"problem": None} for name in runs
    }
    for run in runs.values():
        run()  # allocates the memory that is kept
    timings = interleaved(
        options.repetitions,
        runs,
        lambda name: seconds(runs[name], device),
        lambda name, error: rows[name].update(problem=str(error)),
    )
    for name, timing in timings.items():
        rows[name] |= {"seconds": timing}
    conditions = {"case": str(setting), "precision": precision, "threads": torch.get_num_threads()}
    name = f"first_block-{options.label()}-{device.type}"
    publish(options, "first_block", name, device, conditions, rows.values(), command)


def _runs(setting: Setting, device: torch.device, precision: Any) -> dict[str, Callable[[], Any]]:
    """Return the functions to time, by sweep and way."""
    net, batch = setting.net, setting.batch
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, padding = random(batch, net.in_channels, setting.side, setting.side), net.first_padding
    at, along = (
        Parameters(random(net.width, net.in_channels, 3, 3) / 5, (random(net.width), random(net.width)))
        for _ in range(2)
    )
    in_parts = PlaneBlock(EPILOGUES["instance"], at, along, padding, precision, is_first=True)
    planes_of = partial(x.to, plane_dtype(x.dtype, precision), memory_format=torch.channels_last)
    ways: dict[str, tuple[Block, Callable[[], Any]]] = {"in parts": (in_parts, planes_of)}
    if kernels.has_image_block(ConvLayer(*x.shape[1:], net.width, padding), device):
        patches_of = partial(kernels.image_patches, x, padding, precision)
        ways["without planes"] = (ImageBlock(at, along, precision), patches_of)
    p, _ = in_parts.forward(planes_of())
    bars = [torch.randn_like(p) for _ in range(2)]
    runs: dict[str, Callable[[], Any]] = {}
    for way, (block, inputs_of) in ways.items():
        runs[f"forward, {way}"] = partial(_forward_sweep, block, inputs_of, bars[0])
        runs[f"backward, {way}"] = partial(_backward_sweep, block, inputs_of, *bars)
    patches = F.unfold(x, 3, padding=padding)
    runs["forward, products alone"] = partial(_products, patches, at.weight.flatten(1), 1)
    runs["backward, products alone"] = partial(_products, patches, at.weight.flatten(1), 2)
    return runs


def _forward_sweep(block: Block, inputs_of: Callable[[], Any], p_bar: Tensor) -> None:
    _, activations = block.forward(inputs_of())
    block.backward(activations, p_bar, reuse=True)


def _backward_sweep(block: Block, inputs_of: Callable[[], Any], p_bar: Tensor, p_bar_dot: Tensor) -> None:
    _, _, activations = block.dual(inputs_of(), None, None)
    block.dual_backward(activations, p_bar, p_bar_dot, needs_x_bar=False)


def _products(patches: Tensor, weight: Tensor, directions: int) -> None:
    """Compute the products of each sample: those of the forward sweep with one direction, those of the backward sweep with two."""
    for sample in patches:
        sample @ sample.T  # the statistics
        for _ in range(directions):
            torch.mm(weight, sample)  # u, and u̇
    for sample in patches:
        u = torch.mm(weight, sample)  # again, since it was not kept
        for _ in range(directions):
            torch.mm(u, sample.T)  # U, and U̇
        if directions > 1:
            torch.mm(weight.T, u).addmm_(weight.T, u)  # T
