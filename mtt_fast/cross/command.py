"""Test sets on networks other than their own, as one table: `python -m mtt_fast.cross RUN_OR_FILE…`.

The paper's Table 3: fresh networks of each kind are trained on each set. A cell that is in cross.json already is not
measured again, so a stopped command continues, and sets or networks can be added later.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from mtt_fast.commands import parsing
from mtt_fast.commands.evaluated_set import (
    RANDOM,
    EvaluatedSet,
    SetOptions,
    check_any_trained,
    read_synthetic,
    settings_of,
)
from mtt_fast.commands.network_trial import named_after_option, try_users_network
from mtt_fast.commands.option_fields import Checked, Group, Role, names_of
from mtt_fast.cross.table import markdown, quoted_for, save_plot
from mtt_fast.data import ImageData
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.errors import InputError
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.pools import eval_pool
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import StopRequest, stop_request, stopped_with
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.provenance import choose_device, device_name, digest, versions
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.records import NUMBER, check_form, read_entries, write_record
from mtt_fast.storage.run_folder import lock_folder
from mtt_fast.storage.text_files import write_text
from mtt_fast.training.evaluation import Accuracy, evaluate
from mtt_fast.training.images import Images, RealImages

log = logging.getLogger(__name__)

Train = Callable[[torch.Generator], Images]
"""A function from a network's random numbers to its training images."""

PROGRAM = "python -m mtt_fast.cross"
TABLE, MARKDOWN, PLOT = "cross.json", "cross.md", "cross.png"


@dataclass(frozen=True)
class CrossOptions(SetOptions):
    """Evaluate sets on several networks, and write a table (JSON, Markdown, plot). A stopped command continues when repeated."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SET …")] = ()
    """run folders, files that mtt_fast.evaluate accepts, or the word "random" for random real images like the first set"""
    models: Annotated[tuple[str, ...], Group.EVALUATION] = ()
    """names of the networks to test on; if not given, those of --eval_mode"""
    eval_mode: Annotated[str, Role.EVALUATION, Group.EVALUATION, Checked(partial(eval_pool, model="ConvNet"))] = "M"
    """pool of networks to test on (mtt_fast.evaluate --help lists the letters); M: architectures"""
    out: Annotated[str, Role.LOCATION, Group.OUTPUT, Checked(check_output_folder)] = "runs/cross"
    """folder for the table (JSON, Markdown, plot)"""

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        reasons = super().without_effect() | self.without_effect_on(self.sources)
        return reasons | ({"eval_mode": "with --models, which names the networks"} if self.models else {})


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.preview(CrossOptions, argv, PROGRAM)
    if not options.sources:
        raise InputError(f"expected runs' folders, files, or the word {RANDOM}; see {PROGRAM} --help")
    repeated = {source for source in options.sources if options.sources.count(source) > 1}
    if repeated:
        raise InputError(f"{repeated.pop()}: expected each set once, found it twice")
    sets = _sets(options, argv)
    device = choose_device(options.device)
    with numerics(device, options.precision), lock_folder(Path(options.out)), stop_request() as stop:
        _run(options, sets, device, stop)


def _sets(options: CrossOptions, argv: Sequence[str]) -> list[EvaluatedSet]:
    """Return the sets, each with the options of its distillation, which flags override."""
    synthetics = {source: read_synthetic(source) for source in options.sources}
    same_for_all = names_of(CrossOptions, Role.EVALUATION) - {"batch_train"} | {"seed"}
    settings = {
        source: {name: value for name, value in settings_of(synthetic).items() if name not in same_for_all}
        for source, synthetic in synthetics.items()
        if synthetic is not None
    }
    first = next(iter(settings), None)
    like_first: dict[str, Any] = {}
    if first is not None and (synthetic := synthetics[first]) is not None:
        like_first = settings[first] | {"factor": None, "ipc": len(synthetic.images) // len(synthetic.class_names)}
    return [
        EvaluatedSet(
            source,
            parsing.parse(CrossOptions, argv, PROGRAM, settings.get(source, like_first), source=source),
            synthetic,
        )
        for source, synthetic in synthetics.items()
    ]


def _run(options: CrossOptions, sets: Sequence[EvaluatedSet], device: torch.device, stop: StopRequest) -> None:
    folder, protocols = Path(options.out), describe_protocols(sets)
    measured = read_entries(
        folder / TABLE, "cells", _cell, "a table of this command", "delete it or choose another --out"
    )
    cells = []
    if options.other_data and all(row.synthetic is None for row in sets):
        raise InputError("--other_data: expected a set that records its images, found none; leave it out")
    # the images of all sets are compared before the first network is trained
    data_of_rows = [row.load_data() for row in sets]
    _try_networks(options.models, sets, data_of_rows, device)
    log.info("%s", protocols)
    for row, data in zip(sets, data_of_rows, strict=True):
        networks = _networks(options.models, row, data)
        real = row.real_images(data, device)
        train, lr = row.training_images(real)
        row_key = _row_key(row, real, train, lr)
        for name, network in networks.items():
            key = row_key | {"network": name}
            if outputs := network.describe().get("outputs"):  # a user's network, which may have changed since
                key["outputs"] = outputs
            if precision_on(device, network, row.options.precision) == "bf16":  # the others make no difference
                key["precision"] = "bf16"
            cell = next((cell for cell in measured if cell["question"] == key), None)
            if cell is None:
                cell = {"question": key} | _measure(row, real, train, lr, name, network, stop)
                measured.append(cell)
                write_record(folder / TABLE, {"cells": measured, "versions": versions()})
            log.info("%s on %s: %s", row.source, name, cell["text"])
            # papers count the images that are stored, not the smaller ones in them
            stored = key["ipc"] / (1 if row.source == RANDOM else row.factor**2)
            cells.append({"set": row.source, **cell, "question": key | {"ipc": stored}})
    quoted = quoted_for(cells)
    table = markdown(cells, quoted, protocols)
    write_text(folder / MARKDOWN, table)
    save_plot(folder / PLOT, cells, quoted)
    log.info("%s", table)
    check_any_trained(
        Accuracy(tuple(cell["accuracy"]["values"]), diverged=cell["accuracy"].get("diverged", 0)) for cell in cells
    )


def describe_protocols(sets: Sequence[EvaluatedSet]) -> str:
    """Return the protocol in words; where a set brings settings of its own, each protocol after the names of its sets."""
    sources: dict[str, list[str]] = {}
    for row in sets:
        sources.setdefault(row.options.evaluation_protocol().describe(), []).append(row.source)
    if len(sources) == 1:
        return next(iter(sources))
    return "; ".join(f"{', '.join(names)}: {protocol}" for protocol, names in sources.items())


def _networks(models: Sequence[str], row: EvaluatedSet, data: ImageData) -> dict[str, Trainable]:
    """Return the networks of a row by name. Raises `InputError` for an unknown one."""
    if models:
        return {name: network_by_name(name, data.image_shape, data.num_classes, option="models") for name in models}
    return row.options.evaluated_networks(data)


def _try_networks(
    models: Sequence[str], sets: Sequence[EvaluatedSet], data_of_rows: Sequence[ImageData], device: torch.device
) -> None:
    """Try each user's network once for each shape of images, before any network is trained.

    Raises `InputError` as `try_users_network`, and for an unknown network. Those of one row are in memory at once.
    """
    tried = set()
    for row, data in zip(sets, data_of_rows, strict=True):
        batch = row.options.evaluation_protocol().batch_size
        for name, network in _networks(models, row, data).items():
            if (key := (name, data.image_shape, data.num_classes)) not in tried:
                tried.add(key)
                try_users_network(name, network, *key[1:], device, batch)


def _row_key(row: EvaluatedSet, real: RealImages, train: Train, lr: float) -> dict[str, Any]:
    """Return everything on which the cells of a row depend, except the network. It is the "question" of a cell in cross.json."""
    options, protocol = row.options, row.options.evaluation_protocol()
    example = train(generator_for(options.seed, "evaluation", 0))
    key = {
        "images": RANDOM if row.source == RANDOM else digest(example.pixels, example.labels),
        "canvas": None if example.canvas is None else dataclasses.asdict(example.canvas),
        "ipc": _images_per_class(len(example), real.data.num_classes),
        "lr": lr,
        "dataset": real.data.name,
        "fingerprint": real.data.fingerprint,
        "whitening": real.identity.whitening,
        "protocol": dataclasses.asdict(protocol),
        "networks": options.num_eval,
        "seed": options.seed,
    }
    if row.synthetic and options.other_data:
        key["seen_as"] = row.synthetic.identity.record()
    if protocol.combined and example.real is not None:  # which are augmented in another way
        key["real"] = digest(example.real)
    return key


def _images_per_class(count: int, num_classes: int) -> int | float:
    """Return how many of `count` images a class has, on average where a file's classes differ."""
    return round(count / num_classes, 2) if count % num_classes else count // num_classes


def _measure(
    row: EvaluatedSet, real: RealImages, train: Train, lr: float, name: str, network: Trainable, stop: StopRequest
) -> dict[str, Any]:
    """Train and test the networks of a cell. Raises `Stopped` after a stop request."""
    options, device = row.options, real.test.labels.device
    start = time.monotonic()
    stopped = "stopped; what was measured is saved, and the same command continues"
    with stopped_with(stopped), named_after_option(name):
        result = evaluate(
            network, train, real.test, lr, options.evaluation_protocol(), num_networks=options.num_eval, seed=options.seed,
            name=f"{row.source} on {name}", stop=stop, precision=precision_on(device, network, options.precision),
            at_once=options.networks_at_once,
        )  # fmt: skip
    return {
        "accuracy": result.record(),
        "text": str(result),
        "seconds": time.monotonic() - start,
        "device": device_name(device),
    }


def _cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell, the result of `_measure` with its question. Raises one of `MALFORMED` for anything else."""
    accuracy = {"mean": NUMBER, "std": NUMBER, "n": int, "values": [NUMBER], "diverged?": int}
    check_form(cell, {"question": dict, "accuracy": accuracy, "text": str, "seconds": NUMBER, "device": str})
    return dict(cell)
