"""Train networks on a distilled set and test them on the real test images: `python -m mtt_fast.evaluate RUN_OR_FILE`.

By the paper's protocol, or another by name (mtt_fast/training/protocols.py), for one network or several. The same protocol
evaluates random real images, and files of the public code.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from mtt_fast.commands import cli, parsing
from mtt_fast.commands.evaluated_set import (
    RANDOM,
    EvaluatedSet,
    SetOptions,
    check_any_trained,
    read_synthetic,
    settings_of,
)
from mtt_fast.commands.network_trial import named_after_option, try_users_network
from mtt_fast.commands.option_fields import Checked, Group, Role
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.engine.students.choice import describe_numerics, precision_on
from mtt_fast.errors import InputError
from mtt_fast.runtime.interrupts import stop_request
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.provenance import choose_device, device_name, versions
from mtt_fast.storage.outputs import check_output_file
from mtt_fast.storage.records import write_record
from mtt_fast.training.evaluation import Accuracy, evaluate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions(SetOptions):
    """Train fresh networks on a distilled set (or on random real images), and test them. Files of the public code work too."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SET")] = ""
    """run folder, a synthetic.safetensors, an images_*.pt (with its labels_*.pt beside it), a file of NCFM, or the word "random" """
    out: Annotated[str | None, Role.LOCATION, Group.OUTPUT, Checked(check_output_file)] = None
    """write the result to this JSON file too"""

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        return super().without_effect() | self.without_effect_on([self.source])

    def remarks(self, given: Container[str]) -> list[str]:
        """See `CommonOptions.remarks`."""
        remarks = super().remarks(given)
        if "dataset" not in given and (self.source == RANDOM or self.source.endswith(".pt")):
            remarks.append(f"without --dataset: {self.dataset}, the public code's default")
        return remarks


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    program = "python -m mtt_fast.evaluate"
    source = parsing.preview(EvaluateOptions, argv, program).source
    if not source:
        raise InputError(f"expected a run's folder, a file, or the word {RANDOM}; see {program} --help")
    synthetic = read_synthetic(source)
    settings = {} if synthetic is None else settings_of(synthetic)
    options = parsing.parse(EvaluateOptions, argv, program, settings, source=source)
    device = choose_device(options.device)
    with numerics(device, options.precision):
        _run(options, synthetic, device)


def _run(options: EvaluateOptions, synthetic: SyntheticDataset | None, device: torch.device) -> None:
    protocol = options.evaluation_protocol()
    if options.other_data and synthetic is None:
        raise InputError(
            f"--other_data: expected a set that records its images, found {options.source}, which records none; leave it out"
        )
    evaluated = EvaluatedSet(options.source, options, synthetic)
    data = evaluated.load_data()
    networks = options.evaluated_networks(data)
    for name, network in networks.items():
        try_users_network(name, network, data.image_shape, data.num_classes, device, protocol.batch_size)
    real = evaluated.real_images(data, device)
    train, lr = evaluated.training_images(real)
    protocol = dataclasses.replace(protocol, lr=lr)  # so that its description names the rate that is used
    log.info("%s", protocol.describe())
    accuracies: dict[str, Accuracy] = {}
    with stop_request() as stop:
        for name, network in networks.items():
            with named_after_option(name):
                accuracies[name] = evaluate(
                    network, train, real.test, lr, protocol, num_networks=options.num_eval, seed=options.seed, name=name,
                    stop=stop, precision=precision_on(device, network, options.precision),
                    at_once=options.networks_at_once,
                )  # fmt: skip
            log.info("%s on %s: %s", options.source, name, accuracies[name])
    if options.out:
        first, *_ = networks
        # of random images each network has as many of its own; of a set those count that are stored, as in papers
        is_random = options.source == RANDOM
        write_record(
            options.out,
            {
                "source": options.source,
                "accuracy": accuracies[first].record(),
                "model": first,
                "network": networks[first].describe(),
                "accuracy_by_network": {name: accuracy.record() for name, accuracy in accuracies.items()},
                "lr": lr,
                "images": options.ipc * data.num_classes
                if is_random
                else len(train(torch.Generator())) // evaluated.factor**2,
                "protocol": protocol.record(),
                "dataset": data.name,
                "zca": options.zca,
                "data": real.identity.record(),
                "made_from": None if synthetic is None else synthetic.identity.record(),
                "other_data": options.other_data,
                "device": device_name(device),
                "numerics": describe_numerics(device, networks[first], options.precision),
                "versions": versions(),
            },
        )
    check_any_trained(accuracies.values())


if __name__ == "__main__":
    sys.exit(cli.run(main))
