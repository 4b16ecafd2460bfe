"""Train experts, the first half of the method ("buffer.py" in the public code).

Expert i depends only on (seed, i), and is written as soon as it is trained, so a stopped run continues where it was, and several
processes can share the work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mtt_fast.commands import parsing
from mtt_fast.commands.network_trial import try_users_network
from mtt_fast.commands.options import buffer_folder
from mtt_fast.engine.students.choice import describe_numerics, precision_on
from mtt_fast.experts.missing import numbers_missing, train_missing_experts
from mtt_fast.experts.options import STORE_DTYPES, ExpertOptions
from mtt_fast.interop.order import check_order
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.provenance import choose_device
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.trajectories import experts_in
from mtt_fast.training.experts import ExpertTraining
from mtt_fast.training.images import real_images

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.parse(ExpertOptions, argv, "python -m mtt_fast.experts")
    training = options.training()
    device = choose_device(options.device)
    with numerics(device, options.precision):
        _run(options, training, device)


def _run(options: ExpertOptions, training: ExpertTraining, device: torch.device) -> None:
    data = options.load_data()
    if training.curriculum is not None:
        check_order(training.curriculum.order, data.train.labels, options.sort_method)
    network = options.network(data)
    folder = buffer_folder(options.buffer_path, data, options.model, zca=options.zca)
    if numbers_missing(experts_in(folder), options.num_experts):
        check_output_folder(folder, "choose another `buffer_path`")
    log.info("%s: %s", options.model, describe_numerics(device, network, options.precision))
    try_users_network(options.model, network, data.image_shape, data.num_classes, device, training.batch_size)
    images = real_images(data, device, zca=options.zca)
    store = train_missing_experts(
        folder,
        options.num_experts,
        images,
        network,
        training,
        seed=options.seed,
        dtype=STORE_DTYPES[options.store_dtype],
        precision=precision_on(device, network, options.precision),
        at_once=options.networks_at_once,
    )
    final = torch.tensor([store.metadata(expert).accuracy[-1] for expert in range(len(store))])
    spread = f" ± {final.std():.4f}" if len(final) > 1 else ""
    log.info("%d experts in %s, test accuracy %.4f%s", len(store), folder, final.mean(), spread)
