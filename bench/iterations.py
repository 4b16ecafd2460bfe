"""Read iterations to compare: golden cases, and the iterations of distillations that ran."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open

from bench.cases import TENSORS, Case
from mtt_fast.commands.parsing import apply
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.distill.experts import inventory_of
from mtt_fast.distill.options import DistillOptions
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.storage.run_files import CONFIG, SYNTHETIC
from mtt_fast.storage.run_folder import read_config
from mtt_fast.storage.trajectories import TrajectoryStore

_NETWORK = ("in_channels", "num_classes", "image_size", "width", "depth")


@dataclass(frozen=True)
class NamedCase:
    """A case in float64, with its name, kind of labels, momentum and weight decay."""

    name: str
    case: Case
    label_kind: LabelKind
    momentum: float = 0.0
    weight_decay: float = 0.0


def golden_cases(folder: Path) -> Iterator[NamedCase]:
    """Yield the case of each file in `folder` that holds one. Raises `InputError` where there is none."""
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata, keys = file.metadata() or {}, file.keys()
            if not {*TENSORS} <= {*keys} or not {*_NETWORK} <= {*metadata}:
                continue  # other golden values
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        names.append(path.stem)
        net = ConvNet(**{name: int(metadata[name]) for name in _NETWORK})  # type: ignore[arg-type]
        tensors["lr"] = tensors["lr"].reshape(())
        wide = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
        kind: LabelKind = "probabilities" if wide["labels"].is_floating_point() else "indices"
        yield NamedCase(f"golden {path.stem}", Case(net=net, **wide), kind)
    if not names:
        raise InputError(f"--golden {folder}: expected golden cases, found none")


def run_cases(folder: Path, starts: int) -> Iterator[NamedCase]:
    """Yield `starts` iterations of the distillation in `folder`, on its distilled set.

    The last of them starts at the last epoch of its expert that has a target. The starts of the others are spread evenly from
    half that epoch on. The images are not augmented, and the loss is MTT's. Raises `InputError` where there is no run of a ConvNet.
    """
    config = read_config(folder)
    if config is None or "syn_steps" not in config:
        raise InputError(f"--runs {folder}: expected the folder of a distillation, found none")
    options = apply(DistillOptions(), config, str(folder / CONFIG))
    distilled = SyntheticDataset.load(folder / SYNTHETIC)
    info = dataset_info(options.dataset, options.subset, options.res, options.data_path)
    net, store = options.network(info), TrajectoryStore(inventory_of(options, info).matched_folder)
    if not isinstance(net, ConvNet) or options.texture:
        raise InputError(
            f"--runs {folder}: expected a run of a ConvNet without --texture, found --model {options.model}"
        )
    last, count = int(store.epochs(0)) - options.expert_epochs, len(distilled.images)
    lrs = distilled.lr if distilled.lr_per_step is None else distilled.lr_per_step
    lrs = lrs * (1 - options.student_dampening)  # a velocity μ m + (1 − d) g is 1 − d times that of μ m + g
    for place in reversed(range(starts)):
        epoch = last - place * last // (2 * max(1, starts - 1))
        generator = torch.Generator().manual_seed(0)
        batches = [
            torch.randperm(count, generator=generator)[: options.batch_syn or count] for _ in range(options.syn_steps)
        ]
        case = Case(
            net=net,
            start=store.read(0, epoch).double(),
            target=store.read(0, epoch + options.expert_epochs).double(),
            images=distilled.images.double(),
            labels=distilled.labels.double() if distilled.labels.is_floating_point() else distilled.labels,
            lr=lrs.double(),
            batches=torch.stack(batches),
        )
        kind, name = cast(LabelKind, distilled.label_kind), f"{folder.name}, epoch {epoch}"
        yield NamedCase(name, case, kind, options.student_mom, options.student_l2)
