"""Make a set by a method, evaluate it, and write a run folder: `python -m mtt_fast.baselines METHOD`."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.baselines.checkpoint import check_continues
from mtt_fast.baselines.choosing import evaluate_chosen
from mtt_fast.baselines.learning import learn
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.options import BaselineOptions, TrainedNetworkOptions
from mtt_fast.baselines.trained import first_expert, with_first_expert_training, with_labels
from mtt_fast.commands import parsing
from mtt_fast.commands.earlier_run import earlier_options, options_to_continue
from mtt_fast.commands.network_trial import try_users_network
from mtt_fast.commands.run_loop import Run
from mtt_fast.commands.seconds import Stopwatch, accumulate_seconds, timed_real_images
from mtt_fast.distill.experts import requested_hyperparameters
from mtt_fast.engine.students.choice import describe_numerics
from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.provenance import choose_device, device_name
from mtt_fast.storage.expert_checks import FLAGS
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.run_files import CONFIG
from mtt_fast.storage.run_folder import check_not_taken, lock_folder, lock_inode, write_config
from mtt_fast.training.subsets import check_enough

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast.baselines"


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`, the method's name first."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return
    name = argv[0].lower()
    if name not in METHODS:
        raise InputError(
            f"{argv[0]}: expected a method, one of {', '.join(METHODS)}{did_you_mean(name, list(METHODS))}; "
            f"see {PROGRAM} --help"
        )
    seconds = Stopwatch()
    options = parse_method_options(name, argv[1:])
    folder = options.folder(name)
    device = choose_device(options.device)
    given = parsing.given(type(options), argv)
    # options that are not given say nothing about the expert of the run
    may_differ = set(FLAGS.values()) - given if isinstance(options, TrainedNetworkOptions) else set()
    options, finished = options_to_continue(folder, name, options, given, may_differ)
    if finished:
        return
    options = dataclasses.replace(options, resume=False)  # the files of a run say the same, however it was continued
    check_output_folder(folder, "choose another `out`")
    with numerics(device, options.precision):
        _run(name, options, given, device, shlex.join([*PROGRAM.split(), *argv]), seconds)


def _help() -> str:
    width = max(map(len, METHODS)) + 2
    methods = [f"  {name:{width}}{method.paper}" for name, method in METHODS.items()]
    about = "Make a small training set by another method, and evaluate it like a distilled set."
    more = f"{PROGRAM} METHOD --help lists a method's options."
    return "\n".join([f"usage: {PROGRAM} METHOD [OPTIONS]", "", about, more, "", "methods:", *methods])


@dataclass(frozen=True)
class _Selection:
    """The flags that decide where the other options' defaults come from."""

    out: str | None = None
    resume: bool = False


def parse_method_options(name: str, argv: Sequence[str]) -> BaselineOptions:
    """Return the method's options: defaults, or with --resume those of the run, then flags."""
    program = f"{PROGRAM} {name}"
    chosen = parsing.parse_known(_Selection, argv, program)
    defaults: dict[str, Any] = {}
    folder = Path(chosen.out or "")
    if chosen.resume:
        if chosen.out is None:
            raise InputError("--resume: expected the run's folder with --out, found none")
        config = earlier_options(folder, name)
        if config is None:
            raise InputError(f"--resume: there is no run in {chosen.out}; start it without --resume")
        defaults = {key: value for key, value in config.items() if key != "method"} | {"out": chosen.out}
    options = parsing.parse(METHODS[name].options, argv, program, defaults, source=str(folder / CONFIG))
    options.check()
    return options


def _run(
    name: str,
    options: BaselineOptions,
    given: Set[str],
    device: torch.device,
    command: str,
    seconds: Stopwatch,
) -> None:
    """Make the set of the method called `name`. `given` are the options on the command line, which is `command`."""
    folder = options.folder(name)
    with seconds.of("data"):
        data = options.load_data()
    network = options.network(data)
    trained_options = options if isinstance(options, TrainedNetworkOptions) and options.uses_network else None
    if network.mixes_samples and options.uses_network:
        raise InputError(
            f"--model {options.model}: expected a network that does not mix the images of a batch, as batch norm does: small sets have "
            "other statistics than the data; make the set with another, and evaluate it on this one with python -m mtt_fast.evaluate"
        )
    evaluated = options.evaluated_networks(data)  # refuses a network that does not fit the images, before any work
    check_enough(data, options.ipc)
    if options.uses_network:
        batch = options.ipc * data.num_classes
        try_users_network(options.model, network, data.image_shape, data.num_classes, device, batch)
    real = timed_real_images(data, device, seconds, zca=options.zca)
    if trained_options:
        requested = requested_hyperparameters(trained_options.expert(), given)
        options = trained_options = with_first_expert_training(trained_options, real, network, requested)
    method = METHODS[name]
    with lock_folder(folder), accumulate_seconds(folder, seconds):
        check_continues(folder, real.identity, network.describe())
        write_config(folder, {"method": name} | dataclasses.asdict(options))
        numerics_in_words = describe_numerics(device, network, options.precision)
        log.info(
            "%s: %s, %d images of %s, %s with %d parameters (%s), on %s",
            folder, method.title, options.ipc * data.num_classes, data.name, options.model, network.num_parameters,
            numerics_in_words, device_name(device),
        )  # fmt: skip
        run = Run(
            program=f"{PROGRAM} {name}", command=command, method=method.title, options=options, folder=folder,
            lock=lock_inode(folder), real=real, network=network, evaluated=evaluated, numerics=numerics_in_words,
            seconds=seconds,
        )  # fmt: skip
        if trained_options:
            with seconds.of("experts"):
                first_expert(trained_options, real, network)
        with seconds.of("iterations"):
            result = method.make(options, real, network)
            if trained_options and not isinstance(result, LearnedSet):
                result = with_labels(trained_options, real, network, result)
        check_not_taken(folder, run.lock)  # an expert may have been trained for hours
        if isinstance(result, LearnedSet):
            learn(run, result)
        else:
            evaluate_chosen(run, result)
