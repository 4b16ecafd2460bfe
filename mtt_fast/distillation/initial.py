"""What a distillation starts from."""

from __future__ import annotations

import torch

from mtt_fast.distillation.options import DistillOptions
from mtt_fast.evaluate import random_subset
from mtt_fast.options import RealImages
from mtt_fast.run_folder import State
from mtt_fast.seeding import generator_for


def initial_state(options: DistillOptions, real: RealImages, experts: int) -> State:
    """Return the state before the first iteration, where `experts` experts will take turns."""
    generator = generator_for(options.seed, "initial images")
    start = random_subset(real.train, real.data.num_classes, options.ipc, generator)
    images = start.pixels
    if options.pix_init == "noise":
        images = torch.randn(images.shape, generator=generator).to(images.device)
    lr = torch.full((options.syn_steps,) if options.lr_per_step else (), options.lr_teacher, device=images.device)
    return State(0, experts, images, start.labels.clone(), lr, torch.zeros_like(images), torch.zeros_like(lr))
