"""Check that every option of every command, alone and with its partner, changes the output of a toy job, or is refused or logged.

A job's outcome is what it wrote (numbers alone, without the options that the files repeat), where, and what it said of its plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mtt_fast import TrajectoryStore, compress, evaluate, experts
from mtt_fast.analysis import __main__ as analysis
from mtt_fast.analysis.distance import DistanceOptions
from mtt_fast.analysis.evolution import EvolutionOptions
from mtt_fast.analysis.grid import GridOptions
from mtt_fast.analysis.tables import TablesOptions
from mtt_fast.baselines import command as baselines
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.commands import cli
from mtt_fast.commands.option_fields import fields_of
from mtt_fast.compress import CompressOptions
from mtt_fast.convert import command as convert
from mtt_fast.convert.options import ConvertOptions
from mtt_fast.cross import command as cross
from mtt_fast.cross.command import CrossOptions
from mtt_fast.data import load
from mtt_fast.distill import command as distill
from mtt_fast.distill.options import DistillOptions
from mtt_fast.evaluate import EvaluateOptions
from mtt_fast.experts import ExpertOptions
from mtt_fast.recipes import __main__ as recipes
from mtt_fast.report import __main__ as report
from mtt_fast.storage.files import load_tensors
from mtt_fast.testing import reference_convnet

NETWORK = "--dataset digits --model ConvNetD1W4 --device cpu"
EVALUATION = f"{NETWORK} --num_eval 1 --epoch_eval_train 1"
OF_EXPERTS = f"{NETWORK} --train_epochs 4 --num_experts 2"
RUN = (
    f"{EVALUATION} --num_experts 2 --train_epochs 4 --max_start_epoch 2 --expert_epochs 1 --syn_steps 2 --Iteration 2 "
    "--eval_it 2 --lr_img 10"
)

pytestmark = pytest.mark.slow  # hundreds of jobs


@dataclass(frozen=True)
class Command:
    """A command, its options, and the toy job to which each option is added."""

    options: type
    main: Callable[[Sequence[str]], None]
    job: str = ""


COMMANDS = {
    "distill": Command(DistillOptions, distill.main, f"{RUN} --out new"),
    "experts": Command(ExpertOptions, experts.main, f"{NETWORK} --train_epochs 3 --num_experts 2 --buffer_path new"),
    "evaluate": Command(EvaluateOptions, evaluate.main, f"run {EVALUATION} --out new.json"),
    "cross": Command(CrossOptions, cross.main, f"run {EVALUATION} --eval_mode S --out new"),
    "compress": Command(CompressOptions, compress.main, "buffers/digits/ConvNetD1W4 --num_interpolation 3"),
    "convert": Command(ConvertOptions, convert.main, "pair new --dataset digits --model ConvNetD1W4 --device cpu"),
    "grid": Command(GridOptions, analysis.main, f"grid {RUN} --expert_epochs 1 --syn_steps 1 --out new"),
    "distance": Command(DistanceOptions, analysis.main, "distance run --steps 3 --deltas 2,20 --device cpu --out new"),
    "tables": Command(TablesOptions, analysis.main, "tables run --out new"),
    "evolution": Command(EvolutionOptions, analysis.main, "evolution run"),
    "report": Command(report.ReportOptions, report.main, "run"),
    "recipes": Command(recipes.ListOptions, recipes.main, "datm"),
    **{
        name: Command(
            method.options,
            baselines.main,
            f"{name} {EVALUATION} --out new"
            + " --train_epochs 3 --buffer_path fresh" * (name in ("herding", "forgetting", "kmeans"))
            + " --Iteration 1 --batch_real 16 --eval_it 1" * (name in ("dm", "dc", "dsa", "dd", "ld"))
            + " --outer_loop 2 --inner_loop 1" * (name in ("dc", "dsa")),
        )
        for name, method in METHODS.items()
    },
}


@dataclass(frozen=True)
class Row:
    """An option's values and its expected effect."""

    words: str
    """the option with a value that is not its default"""
    partner: str = ""
    """options that it needs; without them it is refused, unless it is effective alone in another way"""
    message: str = ""
    """what is said: of the refusal alone, or of an option that is told to have no effect"""
    job: str | None = None
    """the job in place of the command's"""


def changes(words: str, partner: str = "", job: str | None = None) -> Row:
    """Return a row for an option that changes the outcome (with its partner)."""
    return Row(words, partner, "", job)


def needs(partner: str, words: str, job: str | None = None) -> Row:
    """Return a row for an option that is refused alone and changes the outcome with its partner."""
    return Row(words, partner, "has no effect", job)


def says(words: str, message: str, job: str | None = None) -> Row:
    """Return a row for an option that is refused, or told to do nothing, in a line that holds `message`."""
    return Row(words, "", message, job)


def told(partner: str, words: str, message: str, job: str | None = None) -> Row:
    """Return a row for an option that is told to do nothing alone and changes the outcome with its partner."""
    return Row(words, partner, message, job)


_DATA = {
    "dataset": changes("--dataset pictures"),
    "subset": needs("--dataset ImageNet", "--subset imagenette"),
    "res": needs("--dataset ImageNet", "--res 16"),
    "data_path": changes("--data_path other"),
    "packed_path": changes("--packed_path other"),
    "download": told(
        "--dataset CIFAR10", "--download", "--download has no effect on digits: only CIFAR10, CIFAR100, MNIST"
    ),
    "zca": changes("--zca"),
    "model": changes("--model ConvNetD2W4"),
    "dsa": changes("--dsa False"),
    "dsa_strategy": changes("--dsa_strategy flip_scale"),
    "seed": changes("--seed 1"),
    "device": says("--device cuda:99", "device cuda:99: this machine has"),
    "precision": says("--precision bf16", "--precision bf16 has no effect on a CPU, which computes in float32"),
}
_EVALUATION = {
    **_DATA,
    "networks_at_once": changes("--networks_at_once 1", "--num_eval 2"),
    "batch_train": changes("--batch_train 3"),
    "num_eval": changes("--num_eval 2"),
    "epoch_eval_train": changes("--epoch_eval_train 2"),
    "eval_mode": changes("--eval_mode C"),
    "protocol": changes("--protocol ddranking"),
    "best_epoch": changes("--best_epoch"),
}
_EXPERTS = {
    "train_epochs": changes("--train_epochs 5"),
    "mom": changes("--mom 0.9"),
    "l2": changes("--l2 0.1"),
    "decay": changes("--decay", "--train_epochs 6"),
    "rho_max": changes("--rho_max 0.1"),
    "rho_min": needs("--rho_max 0.1 --decay --train_epochs 6", "--rho_min 0.01"),
    "alpha": needs("--rho_max 0.1", "--alpha 0.5"),
    "adaptive": needs("--rho_max 0.1", "--adaptive False"),
}
_ANEW = f"{RUN} --out new --buffer_path new_buffers"
"""A distillation that has to train its experts."""


def _of_sets(rest: str) -> dict[str, Row]:
    """Return the rows of options of what networks are trained on; `rest` says where the outcome goes."""
    pt = "{}/images_best.pt " + f"{NETWORK} --num_eval 1 --epoch_eval_train 5 --lr_teacher 1 {rest}"
    return {
        "dataset": changes("--dataset pictures", job=f"random {EVALUATION} {rest}"),
        "zca": changes("--zca", job=f"random {EVALUATION} {rest}"),
        "ipc": changes("--ipc 2", job=f"random {EVALUATION} --lr_teacher 1 {rest}"),
        "lr_teacher": changes("--lr_teacher 0.5"),
        "texture": changes("--texture", job=pt.format("canvases")),
        "canvas_size": needs("--texture", "--canvas_size 1", pt.format("pair")),
        "canvas_samples": needs("--texture", "--canvas_samples 2", pt.format("canvases")),
        "label_kind": changes("--label_kind logits", job=pt.format("soft")),
        "other_data": says("--other_data", "--other_data: has no effect"),
    }


ROWS: dict[str, dict[str, Row]] = {
    "distill": {
        **_EVALUATION,
        **{name: Row(row.words, row.partner, row.message, _ANEW) for name, row in _EXPERTS.items()},
        "recipe": changes("--recipe mnist"),
        "config": changes("--config mine.toml"),
        "out": changes("--out other"),
        "resume": changes("--resume", job="--out run --Iteration 3"),
        "dry_run": changes("--dry_run"),
        "ipc": changes("--ipc 2"),
        "Iteration": changes("--Iteration 3"),
        "syn_steps": changes("--syn_steps 3"),
        "expert_epochs": changes("--expert_epochs 2"),
        "max_start_epoch": changes("--max_start_epoch 3 --seed 5", "--seed 5"),
        "continuous_start": changes("--continuous_start"),
        "min_start_epoch": changes("--min_start_epoch 1"),
        "current_max_start_epoch": Row(
            "--current_max_start_epoch 1 --expansion_end_epoch 9", "", "", f"{RUN} --max_start_epoch 3 --Iteration 8 --out new"
        ),
        "expansion_end_epoch": Row(
            "--expansion_end_epoch 9", "--current_max_start_epoch 1 --min_start_epoch 0 --expansion_end_epoch 1",
            "has no effect without --current_max_start_epoch", f"{RUN} --max_start_epoch 3 --Iteration 8 --out new",
        ),
        "threshold": changes("--threshold 1e-9"),
        "batch_syn": changes("--batch_syn 3"),
        "lr_img": changes("--lr_img 20"),
        "lr_lr": changes("--lr_lr 0.1"),
        "lr_teacher": changes("--lr_teacher 0.2"),
        "lr_per_step": changes("--lr_per_step"),
        "student_mom": changes("--student_mom 0.9"),
        "student_l2": changes("--student_l2 0.1"),
        "gradient": changes("--gradient truncated"),
        "match_step": changes("--match_step nearest --lr_teacher 5", "--lr_teacher 5"),
        "loss_ratio": changes("--loss_ratio 0.5"),
        "num_trajectories": changes("--num_trajectories 2"),
        "pix_init": changes("--pix_init noise"),
        "lr_y": changes("--lr_y 10"),
        "mom_y": needs("--lr_y 10", "--mom_y 0.1"),
        "label_init": needs("--lr_y 10", "--label_init experts"),
        "teacher_label": changes("--teacher_label"),
        "ema_decay": changes("--ema_decay 0.5"),
        "no_aug": changes("--no_aug"),
        "texture": changes("--texture"),
        "canvas_size": needs("--texture", "--canvas_size 3"),
        "canvas_samples": needs("--texture", "--canvas_samples 2"),
        "eval_it": changes("--eval_it 1"),
        "buffer_path": changes("--buffer_path other"),
        "other_data": says("--other_data", "--other_data: has no effect"),
        "num_experts": changes("--num_experts 3"),
        "max_experts": changes("--max_experts 1"),
        "num_interpolation": changes("--num_interpolation 3"),
        "expert_lr": changes("--expert_lr 0.1", job=_ANEW),
        "batch_real": changes("--batch_real 64", job=_ANEW),
        "memory_budget": changes("--memory_budget 100KB"),
        "microbatch": changes("--microbatch 2"),
        "save_seconds": changes("--save_seconds 0"),
    },
    "experts": {
        **_DATA,
        **_EXPERTS,
        "dataset": changes("--dataset pictures"),
        "networks_at_once": changes("--networks_at_once 1"),
        "num_experts": changes("--num_experts 3"),
        "lr_teacher": changes("--lr_teacher 0.1"),
        "batch_train": changes("--batch_train 64"),
        "buffer_path": changes("--buffer_path other"),
        "store_dtype": changes("--store_dtype bfloat16"),
    },
    "evaluate": {
        **_EVALUATION,
        **_of_sets("--out new.json"),
        "source": changes("", job=f"random {EVALUATION} --out new.json"),
        "out": changes("--out other.json"),
    },
    "cross": {
        **_EVALUATION,
        **_of_sets("--eval_mode S --out new"),
        "sources": changes("random"),
        "models": changes("", job=f"run {EVALUATION} --models MLP --out new"),
        "eval_mode": changes("--eval_mode C"),
        "out": changes("--out other"),
    },
    "compress": {
        "folder": changes("", job="three/digits/ConvNetD1W4 --num_interpolation 3"),
        "num_interpolation": changes("--num_interpolation 2"),
        "epochs": changes("--epochs 0 1 4", job="buffers/digits/ConvNetD1W4 --out new"),
        "smooth": changes("--smooth False"),
        "out": changes("--out other"),
    },
    "convert": {
        "source": changes("", job="soft new --dataset digits --model ConvNetD1W4"),
        "destination": changes("", job="pair other --dataset digits --model ConvNetD1W4"),
        "from_": says("--from dc", "expected one res_*.pt, found 0"),
        "to": changes("--to png"),
        "dataset": changes("--dataset pictures"),
        "subset": told("--dataset ImageNet", "--subset imagenette", "--subset imagenette has no effect"),
        "res": told("--dataset ImageNet", "--res 16", "--res 16 has no effect"),
        "data_path": changes("--data_path other"),
        "packed_path": changes("--packed_path other"),
        "download": _DATA["download"],
        "zca": changes("--zca"),
        "model": changes("--model ConvNetD2W4", job=f"public new {NETWORK}"),
        "device": says("--device cuda:99", "--device cuda:99 has no effect on a distilled set, only on experts"),
        "lr_teacher": changes("--lr_teacher 0.5"),
        "label_kind": changes("--label_kind logits", job="soft new --dataset digits"),
        "reorder": changes("--reorder", job="soft new --dataset digits"),
        "hard_labels": changes("--hard_labels", job="soft new --dataset digits"),
        "method": changes("--method DM", job="pair new --to dc --dataset digits"),
        "measure": changes("--measure all", job=f"public new {NETWORK}"),
        "store_dtype": changes("--store_dtype bfloat16", job=f"public new {NETWORK}"),
        "experts_per_file": changes("--experts_per_file 1", job="buffers/digits/ConvNetD1W4 new"),
    },
    "grid": {
        "expert_epochs": changes("--expert_epochs 2"),
        "syn_steps": changes("--syn_steps 2"),
        "out": changes("--out other"),
        "resume": says("--resume", "--resume: not needed"),
    },
    "distance": {
        **_DATA,
        "dataset": says("--dataset pictures", "expected"),
        "zca": says("--zca", "expected"),
        "model": changes("--model ConvNetD2W4"),
        "runs": changes("two=run"),
        **_EXPERTS,
        "train_epochs": needs("--decay", "--train_epochs 1"),
        "decay": changes("--decay", "--train_epochs 1"),
        "rho_min": needs("--rho_max 0.1 --decay --train_epochs 1", "--rho_min 0.01"),
        "networks_at_once": says("--networks_at_once 1", "has no effect"),
        "deltas": changes("--deltas 2,6"),
        "starts": changes("--starts 2"),
        "expert_lr": changes("--expert_lr 0.1"),
        "batch_real": changes("--batch_real 64"),
        "steps": changes("--steps 5"),
        "out": changes("--out other"),
    },
    "tables": {"runs": changes("", job="tables baseline --out new"), "out": changes("--out other")},
    "evolution": {
        "run": changes("", job="evolution baseline"),
        "out": changes("--out other"),
        "seconds": changes("--seconds 1"),
        "rows": changes("--rows 2"),
    },
    "report": {"runs": changes("baseline"), "out": changes("--out other.html")},
    "recipes": {"words": changes("cifar10")},
}  # fmt: skip

_BASELINE = {
    **_EVALUATION,
    "out": changes("--out other"),
    "resume": changes("--resume", job="random --out baselines/random"),
    "ipc": changes("--ipc 2"),
    "lr_net": changes("--lr_net 0.5"),
}
_OF_TRAINED = {
    "buffer_path": changes("--buffer_path other"),
    "train_epochs": changes("--train_epochs 2"),
    "expert_lr": changes("--expert_lr 0.5"),
    "mom": changes("--mom 0.9"),
    "l2": changes("--l2 0.5"),
    "decay": changes("--decay", "--train_epochs 6"),
}
_OF_ITERATIONS = {
    "Iteration": changes("--Iteration 2"),
    "eval_it": changes("--eval_it 1", "--Iteration 2 --eval_it 2"),
    "batch_real": changes("--batch_real 8"),
    "save_seconds": changes("--save_seconds 0"),
    "lr_img": changes("--lr_img 20"),
    "pix_init": changes("--pix_init noise --pix_init real", "--pix_init noise"),
}
_OF_MATCHING = {
    **_OF_ITERATIONS,
    "dis_metric": changes("--dis_metric mse"),
    "outer_loop": changes("--outer_loop 3"),
    "inner_loop": changes("--inner_loop 3"),
}
OWN: dict[str, dict[str, Row]] = {
    "random": {},
    "herding": _OF_TRAINED,
    "forgetting": _OF_TRAINED,
    "kmeans": {**_OF_TRAINED, "pick": changes("--pick centres", job=f"kmeans {EVALUATION} --out new")},
    "dm": _OF_ITERATIONS,
    "dc": _OF_MATCHING,
    "dsa": _OF_MATCHING,
    "dd": {
        **_OF_ITERATIONS,
        "decay_it": changes("--decay_it 1", "--Iteration 2 --decay_it 3"),
        "decay_factor": changes("--decay_factor 0.1", "--Iteration 2 --decay_it 1"),
        "distilled_images_per_class_per_step": changes("--distilled_images_per_class_per_step 2", "--ipc 2"),
        "distill_epochs": changes("--distill_epochs 2"),
        "distill_lr": changes("--distill_lr 0.1"),
        "train_nets_type": changes("--train_nets_type known_init"),
        "n_nets": changes("--n_nets 2"),
    },
    "ld": {
        **{name: row for name, row in _OF_ITERATIONS.items() if name not in ("lr_img", "pix_init")},
        "inner_batch_size": changes("--inner_batch_size 3"),
        "inner_lr": changes("--inner_lr 0.5"),
        "lr_y": changes("--lr_y 0.1"),
    },
}
"""Of the methods of mtt_fast.baselines: the options of each. Those that all have are shown of random alone."""
ROWS |= {name: {**_BASELINE, **own} for name, own in OWN.items()}


def _cases() -> list[Any]:
    """Return all commands with their options. What another command shows of the same option too counts as slow."""
    cases = []
    for command, rows in ROWS.items():
        for option in OWN.get(command) or rows:
            again = command in OWN or (option in _EVALUATION and command != "evaluate")
            again |= option in _EXPERTS and command != "experts"
            name = f"{command}-{option.rstrip('_')}"
            cases.append(pytest.param(command, option, marks=[pytest.mark.slow] * again, id=name))
    return cases


NO_EFFECT = [
    ("distill", f"{RUN} --out new --no_aug --dsa False", "--no_aug: has no effect without --dsa True"),
    (
        "distill",
        f"{RUN} --out new --dsa_strategy flip --dsa False",
        "--dsa_strategy flip: has no effect without --dsa True",
    ),
    ("distill", f"{RUN} --out new --canvas_size 2", "--canvas_size 2: has no effect without --texture"),
    ("distill", "--config idle.toml --dataset digits", "--mom_y 0.5: has no effect without --lr_y"),
    ("distill", "--resume --out run --recipe digits", "--recipe digits: has no effect with --resume"),
    ("evaluate", "run --ipc 2", '--ipc 2: has no effect without "random" among the sets'),
    ("evaluate", "run --texture", "--texture: has no effect without a .pt file among the sets"),
    ("evaluate", "run --canvas_size 3", "--canvas_size 3: has no effect without a .pt file"),
    ("evaluate", "run --label_kind logits", "--label_kind logits: has no effect without a .pt file"),
    ("evaluate", f"random {NETWORK} --label_kind logits", "--label_kind logits: has no effect without a .pt file"),
    ("evaluate", f"pair/images_best.pt {NETWORK} --label_kind logits", "--label_kind logits: has no effect on labels"),
    ("evaluate", f"pair/images_best.pt {NETWORK} --ipc 1", "--ipc 1: has no effect without"),
    ("cross", "run --ipc 2 --out new", "--ipc 2: has no effect without"),
    ("cross", "run --models MLP --eval_mode S --out new", "--eval_mode S: has no effect with --models"),
    (
        "compress",
        "buffers/digits/ConvNetD1W4 --epochs 0 4 --num_interpolation 2",
        "--num_interpolation 2: has no effect",
    ),
    (
        "kmeans",
        f"kmeans {NETWORK} --pick centres --train_epochs 3",
        "--train_epochs 3: has no effect with --pick centres",
    ),
    ("dd", f"dd {NETWORK} --lr_net 0.1", "--lr_net 0.1: has no effect on a set that brings learned rates"),
    ("dc", f"dc {NETWORK} --inner_loop 3", "--inner_loop 3: has no effect with one update of the images"),
    ("convert", "run new --lr_teacher 0.5", "--lr_teacher 0.5: has no effect on a set of this software"),
    ("convert", "run new --label_kind logits", "--label_kind logits: has no effect on a set of this software"),
    ("convert", "run new --method DM", "--method DM: has no effect without --to dc or dc_benchmark"),
    ("convert", "run new --reorder", "--reorder: has no effect on labels that are classes"),
    ("convert", "pair new --dataset digits --hard_labels", "--hard_labels: has no effect on labels that are classes"),
    ("convert", "soft new --to ddranking --lr_teacher 0.5", "--lr_teacher 0.5: has no effect where nothing becomes"),
    ("convert", "run new --measure all", "--measure all: has no effect on a distilled set"),
    ("convert", "buffers/digits/ConvNetD1W4 new --lr_teacher 1", "--lr_teacher 1.0: has no effect on experts"),
    (
        "convert",
        "buffers/digits/ConvNetD1W4 new --store_dtype bfloat16",
        "--store_dtype bfloat16: has no effect on experts",
    ),
    ("convert", f"public new {NETWORK} --experts_per_file 3", "--experts_per_file 3: has no effect on experts"),
]
"""Commands with an option that has no effect with the others, and the beginning of what is said."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with the inputs of the toy jobs: data, experts, a run, a baseline, sets and experts of the public code."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr("mtt_fast.commands.run_loop.save_curves", lambda *_: None)
        patch.setattr("os.fsync", lambda _: None)  # nothing here has to outlive the test
        assert cli.run(distill.main, f"{RUN} --eval_it 1 --out run".split()) == 0
        assert cli.run(experts.main, f"{NETWORK} --train_epochs 5 --num_experts 3 --buffer_path three".split()) == 0
        learned = f"dm {EVALUATION} --Iteration 1 --batch_real 16 --out baseline"
        assert cli.run(baselines.main, learned.split()) == 0
        assert cli.run(baselines.main, f"random {EVALUATION} --out baselines/random".split()) == 0
        assert cli.run(distill.main, f"{RUN} --Iteration 0 --no_aug --out plain".split()) == 0
        _save_foreign_files()
        Path("mine.toml").write_text("student_l2 = 0.5\n")
        Path("idle.toml").write_text("mom_y = 0.5\ncanvas_size = 2\n")
        yield folder


def _save_foreign_files() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds: dict[str, tuple[int, Tensor]] = {
        "pair": (8, torch.arange(10)),
        "canvases": (16, torch.arange(10)),
        "soft": (8, torch.randn(10, 10, generator=generator).softmax(1)),
    }
    for name, (side, labels) in kinds.items():
        Path(name).mkdir()
        torch.save(torch.randn(10, 1, side, side, generator=generator), f"{name}/images_best.pt")
        torch.save(labels, f"{name}/labels_best.pt")
    store = TrajectoryStore("buffers/digits/ConvNetD1W4")
    module = reference_convnet(1, 10, 8, 4, 1)
    whole = []
    for epoch in range(3):
        nn.utils.vector_to_parameters(store.read(0, epoch), module.parameters())
        whole.append([parameter.detach().clone() for parameter in module.parameters()])
    Path("public").mkdir()
    torch.save([whole], "public/replay_buffer_0.pt")
    data = load("digits", data_path="data", progress=False)
    for split, images in (("train", data.train), ("test", data.test)):
        for place in range(60):
            of_class = Path("pictures") / split / str(int(images.labels[place]))
            of_class.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images[place, 0].numpy()).save(of_class / f"{place}.png")


_DROPPED = {
    "versions", "seconds", "command", "options", "recipe", "device", "peak_memory_bytes", "arithmetic", "hyperparameters",
    "seed", "iteration_seconds", "question", "imported_from", "checksum",
}  # fmt: skip
"""Records that repeat the options, or differ from one run to the next."""


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(each) for key, each in value.items() if key not in _DROPPED and "seconds" not in key}
    return [_scrubbed(each) for each in value] if isinstance(value, list) else value


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _content(path: Path) -> Any:
    """Return what a file says, without what repeats the options."""
    if path.suffix == ".safetensors" and "checkpoint" not in path.name:
        tensors, metadata = load_tensors(path)
        told = {key: _scrubbed(json.loads(value)) for key, value in metadata.items() if value.startswith(("{", "["))}
        return told, {name: (str(tensor.dtype), _digest(tensor)) for name, tensor in tensors.items()}
    if path.suffix == ".json" and path.name != "seconds.json":
        return _scrubbed(json.loads(path.read_text()))
    if path.suffix in (".png", ".gif"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


Outcome = tuple[int, list[str], Any]


_ONLY_READ = ("pictures", "pair", "soft", "canvases", "public")


class Toy:
    """A runner of toy jobs, each in a copy of the world."""

    def __init__(self, world: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
        self._world, self._caplog, self._capsys = world, caplog, capsys

    @contextlib.contextmanager
    def copy(self) -> Iterator[None]:
        """Make a fresh copy of the world the working directory within the block."""
        place = self._world.with_name("copy")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for entry in self._world.iterdir():
            if entry.name in _ONLY_READ:
                (place / entry.name).symlink_to(entry)
            else:
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, place / entry.name)
        with contextlib.chdir(place):
            yield

    def _is_of_world(self, path: Path) -> bool:
        """Return whether a file is as it was before the job."""
        before = self._world / path
        return before.exists() and before.stat().st_mtime_ns == path.stat().st_mtime_ns

    def run(self, command: str, words: str) -> tuple[int, list[str], str]:
        """Return the exit status of a job, the lines that it said, and its error."""
        self._caplog.clear()
        with self._caplog.at_level(logging.INFO):
            status = cli.run(COMMANDS[command].main, words.split())
        printed = self._capsys.readouterr()
        error = next((line for line in printed.err.splitlines() if line.startswith("error: ")), "")
        return status, [*self._caplog.messages, *printed.out.splitlines(), error], error

    def outcome(self, command: str, words: str) -> Outcome:
        """Return the status of a job, what it said without what it told of options, and what it wrote."""
        with self.copy():
            status, said, _ = self.run(command, words)
            files = {
                str(path): _content(path)
                for path in sorted(Path().rglob("*"))
                if path.is_file() and "events" not in path.parts and not self._is_of_world(path)
            }
        free = re.compile(r" of \d+ MiB|(?<=: )\d+\.\d s: .*")  # memory that is free, and where the seconds went
        return status, [free.sub("", line) for line in said if not line.startswith("--")], files


@pytest.fixture
def toy(
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> Toy:
    monkeypatch.setattr("mtt_fast.commands.run_loop.save_curves", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda _: None)
    _tell(monkeypatch, "mtt_fast.commands.options.load")
    for job in ("mtt_fast.experts", "mtt_fast.training.protocols"):
        _tell(monkeypatch, f"{job}.concurrency_for", of_result=True)
    for job in ("mtt_fast.distill.command", "mtt_fast.baselines.learning"):
        _tell(monkeypatch, f"{job}.save_checkpoint", arguments=False)
    return Toy(world, caplog, capsys)


def _tell(patch: pytest.MonkeyPatch, name: str, arguments: bool = True, of_result: bool = False) -> None:
    """Have a function say in the log that it is called: with its arguments by name, or with what it returns."""
    module, _, attribute = name.rpartition(".")
    function = getattr(__import__(module, fromlist=[attribute]), attribute)

    def telling(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs) if of_result else None
        logging.getLogger("told").info("%s %s", attribute, found if of_result else kwargs if arguments else "")
        return found if of_result else function(*args, **kwargs)

    patch.setattr(name, telling)


_KNOWN: dict[tuple[str, str], Outcome] = {}
"""Outcomes of jobs without the option that is looked at."""


def before(toy: Toy, command: str, words: str) -> Outcome:
    if (command, words) not in _KNOWN:
        _KNOWN[command, words] = toy.outcome(command, words)
    return _KNOWN[command, words]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_missing(command: str) -> None:
    assert set(ROWS[command]) == set(fields_of(COMMANDS[command].options)), "each option has a row here"


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in OWN), id=name) for name in COMMANDS]
)
def test_the_same_job_has_the_same_outcome(toy: Toy, command: str) -> None:
    """Check that outcomes repeat, since otherwise a different outcome would show nothing."""
    job = COMMANDS[command].job
    assert toy.outcome(command, job) == before(toy, command, job)


@pytest.mark.parametrize(("command", "option"), _cases())
def test_an_option_has_an_effect_or_says_that_it_has_none(toy: Toy, command: str, option: str) -> None:
    row = ROWS[command][option]
    job = COMMANDS[command].job if row.job is None else row.job
    if row.message:
        with toy.copy():
            _, said, _ = toy.run(command, f"{job} {row.words}")
        assert any(row.message in line for line in said), said
    if row.partner or not row.message:
        status, said, files = toy.outcome(command, f"{job} {row.partner} {row.words}")
        other = f"{job} {row.partner}".strip() if row.words else COMMANDS[command].job
        known = before(toy, command, other)
        assert (status, said, files) != known
        assert 0 in (status, known[0]) or option in ("subset", "res", "download"), said  # those show at the loader
        assert not any("has no effect" in line for line in said)


@pytest.mark.parametrize(("command", "words", "message"), NO_EFFECT)
def test_what_has_no_effect_with_the_others_is_refused(toy: Toy, command: str, words: str, message: str) -> None:
    with toy.copy():
        status, _, error = toy.run(command, words)
    assert status == 2
    assert error.startswith(f"error: {message}")


def test_auto_is_right_on_a_cpu() -> None:
    asked = DistillOptions(precision="auto", device="cpu")
    assert "precision" not in asked.without_effect()
    assert "precision" in dataclasses.replace(asked, precision="tf32").without_effect()
