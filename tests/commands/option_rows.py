"""List, for every option of every command, a value with its expected effect on a toy job, and options that have none with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from mtt_fast import compress, evaluate
from mtt_fast.analysis import __main__ as analysis
from mtt_fast.analysis.distance import DistanceOptions
from mtt_fast.analysis.evolution import EvolutionOptions
from mtt_fast.analysis.grid import GridOptions
from mtt_fast.analysis.tables import TablesOptions
from mtt_fast.baselines import command as baselines
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.compress import CompressOptions
from mtt_fast.convert import command as convert
from mtt_fast.convert.options import ConvertOptions
from mtt_fast.cross import command as cross
from mtt_fast.cross.command import CrossOptions
from mtt_fast.distill import command as distill
from mtt_fast.distill.options import DistillOptions
from mtt_fast.evaluate import EvaluateOptions
from mtt_fast.experts import command as experts
from mtt_fast.experts.options import ExpertOptions
from mtt_fast.recipes import __main__ as recipes
from mtt_fast.report import __main__ as report

NETWORK = "--dataset digits --model ConvNetD1W4 --device cpu"
EVALUATION = f"{NETWORK} --num_eval 1 --epoch_eval_train 1"
RUN = (
    f"{EVALUATION} --num_experts 2 --train_epochs 4 --max_start_epoch 2 --expert_epochs 1 --syn_steps 2 --Iteration 2 "
    "--eval_it 2 --lr_img 10"
)


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
            + " --Iteration 1 --batch_real 16 --eval_it 1"
            * (name in ("dm", "dc", "dsa", "dd", "ld", "ratbptt", "atbptt"))
            + " --window 2 --totwindow 3" * (name == "ratbptt")
            + " --window 2 --d 1 --totwindow 4" * (name == "atbptt")
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


def says(words: str, message: str) -> Row:
    """Return a row for an option that is refused, or told to do nothing, in a line that holds `message`."""
    return Row(words, "", message)


def told(partner: str, words: str, message: str, job: str | None = None) -> Row:
    """Return a row for an option that is told to do nothing alone and changes the outcome with its partner."""
    return Row(words, partner, message, job)


_NO_DOWNLOAD = "--download has no effect on digits: only CIFAR10, CIFAR100, MNIST"
_DATA = {
    "dataset": changes("--dataset pictures"),
    "subset": needs("--dataset ImageNet", "--subset imagenette"),
    "res": needs("--dataset ImageNet", "--res 16"),
    "data_path": changes("--data_path other"),
    "packed_path": changes("--packed_path other"),
    "download": told("--dataset CIFAR10", "--download", _NO_DOWNLOAD),
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
_LEAVING_OUT = "--sort_method order.pt --add_end_epoch 0 --rm_epoch_first 0"
"""A curriculum that leaves images out from the second epoch on."""
_WINDOW = "--pix_init window --score_path scores.npy"
"""A window by the scores 0 and 1, which may be of either kind."""
_ANEW = f"{RUN} --out new --buffer_path new_buffers"
"""A distillation that has to train its experts."""


def _of_sets(rest: str) -> dict[str, Row]:
    """Return the rows of options of what networks are trained on; `rest` says where the outcome goes."""
    pt = "{}/images_best.pt " + f"{NETWORK} --num_eval 1 --epoch_eval_train 5 --lr_teacher 1 {rest}"
    return {
        "dataset": changes("--dataset pictures", job=f"random {EVALUATION} {rest}"),
        "zca": changes("--zca", job=f"random {EVALUATION} {rest}"),
        # a set of another data set is refused before that is loaded
        "download": told("--dataset CIFAR10", "--download", _NO_DOWNLOAD, job=f"random {EVALUATION} {rest}"),
        "ipc": changes("--ipc 2", job=f"random {EVALUATION} --lr_teacher 1 {rest}"),
        "lr_teacher": changes("--lr_teacher 0.5"),
        "texture": changes("--texture", job=pt.format("canvases")),
        "canvas_size": needs("--texture", "--canvas_size 1", pt.format("pair")),
        "canvas_samples": needs("--texture", "--canvas_samples 2", pt.format("canvases")),
        "label_kind": changes("--label_kind logits", job=pt.format("soft")),
        "distilled_share": needs("--protocol selmatch", "--distilled_share 0.5", pt.format("two")),
        "factor": changes("--factor 2", job=pt.format("pair")),
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
        "noise_start": changes("--noise_start 0.1"),
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
        "mom_img": changes("--mom_img 0.9"),
        "lr_decay": says("--lr_decay", "--lr_decay has no effect at --Iteration 2 and --lr_img 10"),
        "lr_lr": changes("--lr_lr 0.1"),
        "lr_teacher": changes("--lr_teacher 0.2"),
        "lr_per_step": changes("--lr_per_step"),
        "student_mom": changes("--student_mom 0.9"),
        "student_dampening": needs("--student_mom 0.9", "--student_dampening 0.5"),
        "student_l2": changes("--student_l2 0.1"),
        "gradient": changes("--gradient truncated"),
        "match_step": changes("--match_step nearest --lr_teacher 5", "--lr_teacher 5"),
        "loss_ratio": changes("--loss_ratio 0.5"),
        "depth_ratio": changes("--depth_ratio 0.5"),
        "num_trajectories": changes("--num_trajectories 2"),
        "pix_init": changes("--pix_init noise"),
        "score_path": changes(_WINDOW),
        "score": needs(_WINDOW, "--score forgetting"),
        "window_start": needs(_WINDOW, "--window_start 2"),
        "distilled_share": changes("--distilled_share 0.5", "--ipc 2"),
        "msz_per_channel": changes("--msz_per_channel 5 --ipc 2", "--ipc 2"),
        "parametrisation": changes("--parametrisation mine.py:Scaled"),
        "parametrisation_options": needs("--parametrisation mine.py:Scaled", "--parametrisation_options scale=2"),
        "lr_y": changes("--lr_y 10"),
        "mom_y": needs("--lr_y 10", "--mom_y 0.1"),
        "label_init": needs("--lr_y 10", "--label_init experts"),
        "teacher_label": changes("--teacher_label"),
        "ema_decay": changes("--ema_decay 0.5"),
        "cam_model": changes("--cam_model ConvNetD2W4"),
        "cam_interval": needs("--cam_model ConvNetD2W4", "--cam_interval 1"),
        "cam_beta": needs("--cam_model ConvNetD2W4", "--cam_beta 2"),
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
        "sort_method": changes("--sort_method order.pt"),
        "init_ratio": needs("--sort_method order.pt", "--init_ratio 0.5"),
        "add_end_epoch": needs("--sort_method order.pt", "--add_end_epoch 1"),
        "rm_epoch_first": needs("--sort_method order.pt --add_end_epoch 0", "--rm_epoch_first 1"),
        "rm_epoch_second": needs(f"{_LEAVING_OUT} --rm_epoch_second 0", "--rm_epoch_second 1"),
        "rm_easy_ratio_first": needs(_LEAVING_OUT, "--rm_easy_ratio_first 0.5"),
        "rm_easy_ratio_second": needs(f"{_LEAVING_OUT} --rm_epoch_second 0", "--rm_easy_ratio_second 0.5"),
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
        "distilled_share": changes("--distilled_share 0.5", job="two new --dataset digits"),
        "factor": changes("--factor 2"),
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
    "labels": changes("--labels experts"),
    "label_epoch": needs("--labels experts", "--label_epoch 1"),
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
_OF_WINDOWS = {
    **_OF_ITERATIONS,
    "batch_per_class": changes("--batch_per_class 1", "--ipc 2"),
    "task_sampler_nc": changes("--task_sampler_nc 4"),
    "totwindow": changes("--totwindow 9"),
    "inner_lr": changes("--inner_lr 0.1"),
    "syn_strategy": changes("--syn_strategy none"),
    "real_strategy": changes("--real_strategy none"),
    "clip_coef": changes("--clip_coef 0", "--Iteration 6 --pix_init real"),
    "train_y": changes("--train_y"),
    "label_lr_scale": needs("--train_y", "--label_lr_scale 0.01"),
}
_LABELLED = "--labels experts --train_epochs 3 --buffer_path fresh"
OWN: dict[str, dict[str, Row]] = {
    "random": {
        **_BASELINE,
        **{name: needs(f"{_LABELLED} {row.partner}", row.words) for name, row in _OF_TRAINED.items()},
        "labels": changes(_LABELLED),
        "label_epoch": needs(_LABELLED, "--label_epoch 1"),
    },
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
    "ratbptt": {
        **_OF_WINDOWS,
        "window": changes("--window 1", "--minwindow 1"),
        "minwindow": changes("--minwindow 1", "--window 1"),
    },
    "atbptt": {
        **_OF_WINDOWS,
        "window": changes("--window 3"),
        "d": changes("--d 0", "--window 3 --totwindow 9"),
        "clip_coef": changes("--clip_coef 0", "--Iteration 12 --pix_init real --batch_real 1"),
    },
}
"""Of the methods of mtt_fast.baselines: the options of each. Those that all have are shown of random alone."""
ROWS |= {name: {**_BASELINE, **own} for name, own in OWN.items()}


def option_cases() -> list[Any]:
    """Return all commands with their options. What another command shows of the same option too counts as slow."""
    cases = []
    for command, rows in ROWS.items():
        for option in OWN.get(command, rows):
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
    ("dd", f"dd {NETWORK} --lr_net 0.1", "--lr_net 0.1: has no effect on a set with learned rates"),
    ("dc", f"dc {NETWORK} --inner_loop 3", "--inner_loop 3: has no effect with one update of the images"),
    ("convert", "run new --lr_teacher 0.5", "--lr_teacher 0.5: has no effect on a set of mtt_fast"),
    ("convert", "run new --label_kind logits", "--label_kind logits: has no effect on a set of mtt_fast"),
    ("convert", "run new --method DM", "--method DM: has no effect without --to dc or dc_benchmark"),
    ("convert", "run new --reorder", "--reorder: has no effect on labels that are classes"),
    ("convert", "pair new --dataset digits --hard_labels", "--hard_labels: has no effect on labels that are classes"),
    (
        "convert",
        "soft new --to ddranking --lr_teacher 0.5",
        "--lr_teacher 0.5: has no effect without --to synthetic or png",
    ),
    ("convert", "run new --measure all", "--measure all: has no effect on a distilled set"),
    ("convert", "buffers/digits/ConvNetD1W4 new --lr_teacher 1", "--lr_teacher 1.0: has no effect on experts"),
    (
        "convert",
        "buffers/digits/ConvNetD1W4 new --store_dtype bfloat16",
        "--store_dtype bfloat16: has no effect on experts",
    ),
    (
        "convert",
        f"public new {NETWORK} --experts_per_file 3",
        "--experts_per_file 3: has no effect on imported experts",
    ),
]
"""Commands with an option that has no effect with the others, and the beginning of what is said."""
