"""Count the bytes of a step of a student of ConvNet."""

from __future__ import annotations

import torch

from mtt_fast import ConvNet
from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.engine.students.protocol import StepBytes, Student


def image_shape(net: ConvNet) -> torch.Size:
    assert isinstance(net.image_size, int)
    return torch.Size((net.in_channels, net.image_size, net.image_size))


def live_bytes_of_a_step(student: Student, net: ConvNet, batch: int, device: str) -> StepBytes:
    """Return the bytes of the tensors in a step on `batch` samples that torch allocates beyond the step's arguments."""
    theta, v = (torch.zeros(net.num_parameters, device=device) for _ in range(2))
    images, labels = (
        torch.zeros(batch, *image_shape(net), device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
    )
    with CountLiveBytes() as gradient:
        student.gradient(theta, images, labels)
    with CountLiveBytes() as gradient_jvp:
        student.gradient_jvp(theta, images, labels, v)
    with CountLiveBytes() as saving:
        activations = student.gradient(theta, images, labels, save=True).saved
        saved, forward_peak = saving.live, saving.peak
        saving.peak = saved
        student.gradient_jvp(theta, images, labels, v, activations)
    return StepBytes(gradient.peak, forward_peak, gradient_jvp.peak, saving.peak - saved, saved, 0)
