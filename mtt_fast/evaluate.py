"""How well networks do that were trained on a distilled set alone: `python -m mtt_fast.evaluate RUN_OR_FILE`.

The paper's protocol, or another by name (mtt_fast/training/protocols.py), on one network or several. The same protocol measures
random real images, and files of the public code.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import tyro

from mtt_fast.commands import cli, parsing
from mtt_fast.commands.evaluated_set import RANDOM, SetOptions, read_synthetic, settings_of, training_set
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.engine.student_choice import describe_arithmetic, precision_on
from mtt_fast.errors import InputError
from mtt_fast.runtime.interrupts import stop_request
from mtt_fast.runtime.numerics import arithmetic
from mtt_fast.runtime.provenance import choose_device, device_name, versions
from mtt_fast.storage.files import write_json
from mtt_fast.training.images import real_images
from mtt_fast.training.protocols import evaluate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions(SetOptions):
    """Train fresh networks on a distilled set, random real images, or files of the public code, and test them."""

    source: tyro.conf.Positional[str] = ""
    """a run's folder, a synthetic.safetensors, an images_*.pt with its labels_*.pt beside it, or the word "random" """
    out: str | None = None
    """also write the result to this JSON file"""


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    program = "python -m mtt_fast.evaluate"
    options = parsing.parse(EvaluateOptions, argv, program)
    if not options.source:
        raise InputError(f"expected a run's folder, a file, or the word {RANDOM}; see {program} --help")
    synthetic = read_synthetic(options.source)
    if synthetic is not None:
        options = parsing.parse(EvaluateOptions, argv, program, settings_of(synthetic))
    device = choose_device(options.device)
    with arithmetic(device, options.precision):
        _run(options, synthetic, device)


def _run(options: EvaluateOptions, synthetic: SyntheticDataset | None, device: torch.device) -> None:
    protocol = options.evaluation_protocol()
    data = options.load_data()
    networks = options.evaluated_networks(data)
    real = real_images(data, options.zca, device)
    train, lr = training_set(options, options.source, synthetic, real, device)
    log.info("%s", protocol.describe())
    found = {}
    with stop_request() as stop:
        for name, network in networks.items():
            found[name] = evaluate(
                network, train, real.test, lr, protocol, networks=options.num_eval, seed=options.seed, name=name,
                stop=stop, precision=precision_on(device, network, options.precision),
                at_once=options.networks_at_once,
            )  # fmt: skip
            log.info("%s on %s: %s", options.source, name, found[name])
    if options.out:
        first, *_ = networks
        write_json(
            options.out,
            {
                "source": options.source,
                "accuracy": found[first].record(),
                "model": first,
                "accuracy_by_network": {name: result.record() for name, result in found.items()},
                "lr": lr,
                "protocol": protocol.record(),
                "dataset": data.name,
                "zca": options.zca,
                "device": device_name(device),
                "arithmetic": describe_arithmetic(device, networks[first], options.precision),
                "versions": versions(),
            },
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
