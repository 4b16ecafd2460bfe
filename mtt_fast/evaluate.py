"""How well networks do that were trained on a distilled set alone: `python -m mtt_fast.evaluate RUN_OR_FILE`.

The paper's protocol: fresh networks, 1000 epochs of SGD at the learned rate (momentum 0.9, weight decay 5e-4, ×0.1
after half), augmentation, test accuracy at the end. The same protocol measures random real images, and files of the
public code.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from mtt_fast import cli
from mtt_fast.arithmetic import arithmetic, describe_arithmetic, precision_on
from mtt_fast.augment import augment_by_strategy
from mtt_fast.choice import student_for
from mtt_fast.errors import InputError
from mtt_fast.files import write_json
from mtt_fast.interop.plain import guess_label_kind
from mtt_fast.interrupts import Stopped, StopRequest, stop_request
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.memory import AUTO
from mtt_fast.options import CommonOptions, RealImages, at_least, real_images
from mtt_fast.provenance import choose_device, device_name, versions
from mtt_fast.run_folder import SYNTHETIC
from mtt_fast.seeding import generator_for
from mtt_fast.student import Network, Student
from mtt_fast.synthetic import SyntheticDataset, load_public_pair
from mtt_fast.together import Work, crew_for, result_of, together
from mtt_fast.training import Images, Sgd, count_right, epoch_on

log = logging.getLogger(__name__)

RANDOM = "random"
"""The source that stands for random real images."""
REAL_IMAGES_LR = 0.01
"""Learning rate for real images, and for files that bring none, as in the public code."""


@dataclass(frozen=True)
class EvaluationProtocol:
    """The paper's way to train a network on a small set (the public code's `evaluate_synset`)."""

    epochs: int = 1000
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of networks that differ only in their random numbers."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean, in [0, 1]."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over the networks (n − 1); 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def record(self) -> dict[str, Any]:
        """Return mean, std and n, and the values themselves."""
        return {"mean": self.mean, "std": self.std, "n": len(self.values), "values": list(self.values)}

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} % ± {100 * self.std:.2f} (n = {len(self.values)})"


def train_network(
    network: Network,
    theta: Tensor,
    images: Images,
    lr: float,
    protocol: EvaluationProtocol,
    generator: torch.Generator,
    precision: Precision = "fp32",
    stop: StopRequest | None = None,
) -> Tensor:
    """Train from `theta` (P,) on `images` by the protocol; return the final parameters (P,).

    As in the public code, `epochs` + 1 epochs are run, and after number `epochs` // 2 + 1 the rate is divided by ten
    and the momentum starts anew.
    """
    return result_of(_training(network, theta, images, lr, protocol, generator, precision, stop))


def _training(
    network: Network,
    theta: Tensor,
    images: Images,
    lr: float,
    protocol: EvaluationProtocol,
    generator: torch.Generator,
    precision: Precision,
    stop: StopRequest | None,
) -> Work[Tensor]:
    """`train_network`, an epoch at a time."""
    student = _student(network, images, precision)
    sgd = Sgd(lr, protocol.momentum, protocol.weight_decay, protocol.batch_size)
    augment = augment_by_strategy(protocol.augment)
    velocity, run_epoch = torch.zeros_like(theta), epoch_on(student, images, sgd, augment)
    for epoch in range(protocol.epochs + 1):
        if stop:
            raise Stopped("stopped during an evaluation; its networks are not kept", stop.signum)
        theta, velocity, _ = run_epoch(theta, velocity, generator)
        if epoch == protocol.epochs // 2 + 1:
            velocity = torch.zeros_like(theta)
            run_epoch = epoch_on(student, images, dataclasses.replace(sgd, lr=sgd.lr * 0.1), augment)
        yield
    return theta


def _student(network: Network, images: Images, precision: Precision) -> Student:
    kind: LabelKind = "probabilities" if images.labels.is_floating_point() else "indices"
    return student_for(network, images.labels.device, kind, precision=precision)


def evaluate(
    network: Any,
    train: Callable[[torch.Generator], Images],
    test: Images,
    lr: float,
    protocol: EvaluationProtocol,
    *,
    networks: int,
    seed: int,
    place: Sequence[int] = (),
    name: str = "evaluation",
    stop: StopRequest | None = None,
    precision: Precision = "fp32",
    at_once: int | None = None,
    memory_budget: str = AUTO,
) -> Accuracy:
    """Train `networks` fresh networks, each on `train(generator)`, and test each at the end.

    `network` has `init(generator)`. Network k's random numbers follow from (`seed`, "evaluation", *`place`, k) alone,
    and its result does not depend on how many are trained `at_once` (mtt_fast/together.py).
    Raises `Stopped` between two epochs after a stop request.
    """

    def work(k: int) -> Work[float]:
        generator = generator_for(seed, "evaluation", *place, k)
        theta = network.init(generator).to(test.labels.device)
        training = _training(network, theta, train(generator), lr, protocol, generator, precision, stop)
        theta = yield from training
        right = count_right(network, theta, test)
        yield
        return int(right) / len(test)

    device = test.labels.device
    example = train(generator_for(seed, "evaluation", *place, 0))
    crew = crew_for(
        network, _student(network, example, precision), example.pixels.shape[1:], device,
        batch=min(protocol.batch_size, len(example)), works=networks, asked=at_once, memory_budget=memory_budget,
    )  # fmt: skip
    values = [0.0] * networks
    with tqdm(total=networks, desc=name, unit="network", leave=False) as bar:
        for k, value in together((work(k) for k in range(networks)), crew, device):
            values[k] = value
            bar.update()
    return Accuracy(tuple(values))


def random_subset(real: Images, num_classes: int, ipc: int, generator: torch.Generator) -> Images:
    """Return `ipc` random real images of each class, class-major, as networks see them (floating point).

    Raises `InputError` if a class has fewer.
    """
    chosen = [members[:ipc] for members in shuffled_classes(real, num_classes, ipc, generator)]
    return Images(*real.batch(torch.cat(chosen).to(real.labels.device)))


def shuffled_classes(real: Images, num_classes: int, ipc: int, generator: torch.Generator) -> list[Tensor]:
    """Return, for each class, where its images are in `real`, in random order: a vector of indices on the CPU.

    Raises `InputError` if a class has fewer than `ipc`.
    """
    shuffled = []
    labels = real.labels.cpu()
    for label in range(num_classes):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < ipc:
            raise InputError(f"--ipc {ipc}: class {label} has only {len(members)} real images; use a smaller --ipc")
        shuffled.append(members[torch.randperm(len(members), generator=generator)])
    return shuffled


def as_training_images(synthetic: SyntheticDataset, device: torch.device) -> Images:
    """Return a distilled set as images to train on; label logits become probabilities."""
    moved = synthetic.to(device)
    labels = moved.labels.softmax(dim=1) if synthetic.label_kind == "logits" else moved.labels
    return Images(moved.images, labels)


@dataclass(frozen=True)
class EvaluateOptions(CommonOptions):
    """Train fresh networks on a distilled set, random real images, or files of the public code, and test them."""

    source: tyro.conf.Positional[str] = ""
    """a run's folder, a synthetic.safetensors, an images_*.pt with its labels_*.pt beside it, or the word "random" """
    ipc: int = 1
    """images a class, of random real images"""
    num_eval: int = 5
    """networks to train"""
    epoch_eval_train: int = 1000
    """epochs of each"""
    lr_teacher: float | None = None
    """learning rate; without it the learned one, or 0.01 where there is none"""
    label_kind: str | None = None
    """of soft labels in a .pt file: probabilities or logits (guessed from their sums without this)"""
    out: str | None = None
    """also write the result to this JSON file"""

    def protocol(self) -> EvaluationProtocol:
        """Return the evaluation protocol. Raises `InputError` for values that cannot be."""
        complaint = at_least(1, num_eval=self.num_eval, batch_train=self.batch_train, ipc=self.ipc) or at_least(
            0, epoch_eval_train=self.epoch_eval_train
        )
        if complaint:
            raise InputError(complaint)
        return EvaluationProtocol(epochs=self.epoch_eval_train, batch_size=self.batch_train, augment=self.strategy)


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    program = "python -m mtt_fast.evaluate"
    options = cli.parse(EvaluateOptions, argv, program)
    if not options.source:
        raise InputError(f"expected a run's folder, a file, or the word {RANDOM}; see {program} --help")
    synthetic = None
    if options.source != RANDOM and not options.source.endswith(".pt"):
        path = Path(options.source)
        synthetic = SyntheticDataset.load(path / SYNTHETIC if path.is_dir() else path)
        names = {field.name for field in dataclasses.fields(CommonOptions)} | {"num_eval", "epoch_eval_train"}
        recipe = {name: value for name, value in synthetic.recipe.items() if name in names and name != "device"}
        options = cli.parse(EvaluateOptions, argv, program, recipe)
    device = choose_device(options.device)
    with arithmetic(device, options.precision):
        _run(options, synthetic, device)


def _run(options: EvaluateOptions, synthetic: SyntheticDataset | None, device: torch.device) -> None:
    protocol = options.protocol()
    data = options.load_data()
    network = options.network(data)
    precision = precision_on(device, network, options.precision)
    real = real_images(data, options.zca, device)
    train, lr = _training_set(options, synthetic, real, device)
    with stop_request() as stop:
        result = evaluate(
            network, train, real.test, lr, protocol, networks=options.num_eval, seed=options.seed, stop=stop,
            precision=precision, at_once=options.networks_at_once,
        )  # fmt: skip
    log.info("%s: %s", options.source, result)
    if options.out:
        write_json(
            options.out,
            {
                "source": options.source,
                "accuracy": result.record(),
                "lr": lr,
                "protocol": dataclasses.asdict(protocol),
                "model": options.model,
                "dataset": data.name,
                "zca": options.zca,
                "device": device_name(device),
                "arithmetic": describe_arithmetic(device, network, options.precision),
                "versions": versions(),
            },
        )


def _training_set(
    options: EvaluateOptions, synthetic: SyntheticDataset | None, real: RealImages, device: torch.device
) -> tuple[Callable[[torch.Generator], Images], float]:
    """Return what each network trains on, and the learning rate."""
    if synthetic is not None:
        images, learned = as_training_images(synthetic, device), float(synthetic.lr)
    elif options.source == RANDOM:
        classes = real.data.num_classes
        return (
            lambda generator: random_subset(real.train, classes, options.ipc, generator),
            options.lr_teacher or REAL_IMAGES_LR,
        )
    else:
        pixels, labels, rate = load_public_pair(options.source)
        images = Images(pixels.to(device), _as_targets(labels, options.label_kind).to(device))
        learned = REAL_IMAGES_LR if rate is None else float(rate)
    if tuple(images.pixels.shape[1:]) != real.data.image_shape:
        raise InputError(
            f"{options.source}: expected images {real.data.image_shape} of {real.data.name}, found "
            f"{tuple(images.pixels.shape[1:])}; name their data set with --dataset, --res"
        )
    return lambda _: images, options.lr_teacher or learned


def _as_targets(labels: Tensor, kind: str | None) -> Tensor:
    """Return class indices or probabilities; successors of the public code write logits under the same name."""
    if not labels.is_floating_point():
        return labels
    if kind is None:
        kind = guess_label_kind(labels)
        log.info("labels are soft; taken as %s", kind)
    return labels.softmax(dim=1) if kind == "logits" else labels


if __name__ == "__main__":
    sys.exit(cli.run(main))
