"""Try a user's network before a command's first step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

from mtt_fast.engine.unroll import unroll
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.networks.users_network import UsersNetwork
from mtt_fast.user_code import user_errors

log = logging.getLogger(__name__)

_SAMPLES = 8  # of a trial, at most; a whole batch of an expert may not fit in memory with two derivatives
_OF_THE_LIBRARY = ("`net`: ", "`net`, `loss`: ", "FlatModule: ")  # how messages of the library begin


def try_users_network(
    name: str, network: Trainable, image_shape: tuple[int, int, int], num_classes: int, device: torch.device, batch: int
) -> None:
    """Differentiate through two steps of `network`, called `name`, on random images (C, H, W), if it is a user's.

    `batch` is the number of images in a step. Raises `InputError` unless the network is twice differentiable, returns the same
    outputs in a second call, and (if it is not known to mix samples) the same outputs for a sample alone and beside others.
    Otherwise the gradient would be wrong without any other symptom. Warns if samples are mixed, except by a batch norm.
    """
    if not isinstance(network, UsersNetwork):
        return
    if network.mixes_samples and network.statistics is None:
        log.warning(
            "--model %s: the outputs of an image depend on the others of its batch, in tests too; if they should not, look for an operation "
            "over the first dimension, as of a layer without batch_first=True",
            name,
        )
    generator = torch.Generator().manual_seed(0)
    count = min(batch, _SAMPLES)
    images = torch.randn(count, *image_shape, generator=generator).to(device).requires_grad_()
    labels = (torch.arange(count) % num_classes).to(device)
    order = torch.arange(count).expand(2, count)
    theta = network.init(generator).to(device)
    microbatch = None if network.mixes_samples else (count + 1) // 2
    with named_after_option(name), user_errors("model", name):
        path = unroll(network, theta, images, labels, 0.01, order, microbatch=microbatch)
        path[-1].square().sum().backward()


@contextlib.contextmanager
def named_after_option(name: str) -> Iterator[None]:
    """Raise the library's errors about a network as errors of the option `model`, whose value is `name`."""
    try:
        yield
    except InputError as error:
        begin = next(filter(str(error).startswith, _OF_THE_LIBRARY), None)
        if begin is None:
            raise
        raise InputError(f"`model` {name}: {str(error).removeprefix(begin)}") from error
