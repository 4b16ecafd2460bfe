"""Plan the memory of an iteration's student steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands.network_trial import named_after_option
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.parametrised import ImageParameters
from mtt_fast.distill.segments import augmentation
from mtt_fast.engine.memory_plan import Plan, plan, plan_for
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.kernels import Precision
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.memory_info import AUTO


def plan_steps(
    options: DistillOptions,
    network: Trainable,
    images: Sequence[int],
    device: torch.device,
    precision: Precision,
    *,
    image_parameters: ImageParameters | None = None,
) -> Plan:
    """Return the memory plan of the student steps of an iteration.

    `images` is (n, C, H, W): the number of synthetic images, and the shape of a real one. A budget of "auto" leaves room for
    `image_parameters`, those of a parametrisation. Raises `InputError` for a budget that is too small. In fp16 it must also
    suffice for tf32, since an iteration that overflows is repeated in tf32.
    """
    if precision == "fp16":
        plan_steps(options, network, images, device, "tf32", image_parameters=image_parameters)
    canvas = options.canvas or Canvas(1)
    count, channels, height, width = images
    unlimited = plan(
        network,
        images=(count, channels, height * canvas.size, width * canvas.size),
        steps=options.syn_steps,
        batch=(options.batch_syn or count) * canvas.samples,
        memory_budget=None,
        device=device,
        momentum=options.student_mom,
        augment=augmentation(options) or False,
        label_kind=options.label_kind,
        path_gradient=options.match_step == "nearest",
        precision=precision,
    )
    reserved, fix = 0, "lower `batch` or `steps`"
    learned, in_checkpoint = image_parameters or ImageParameters()
    if learned and options.memory_budget == AUTO:
        reserved = 4 * (in_checkpoint + 2 * learned)  # their module has a copy, and gradients
        fix += f", or --ipc or the sizes of --parametrisation, whose {learned:,} parameters take {-(-reserved // 2**20)} MiB"
    with named_after_option(options.model):
        return plan_for(unlimited.work, options.memory_budget, options.microbatch, fix, reserved=reserved)


def plan_in_tf32(plan: Plan) -> Plan:
    """Return the plan that repeats in tf32 an iteration of `plan`, which is in fp16, within the same budget."""
    student = plan.work.student
    assert isinstance(student, FusedConvNetStudent)
    work = dataclasses.replace(plan.work, student=dataclasses.replace(student, precision="tf32"))
    return plan_for(work, plan.budget, None if plan.budget else plan.microbatch)
