"""Compare the flags of every command and their defaults with a table, beside those of the public code: a new one is a decision."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtt_fast import InputError
from mtt_fast.commands import parsing
from mtt_fast.commands.help_page import help_texts, print_help
from mtt_fast.commands.option_fields import Group, Range, fields_of
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from mtt_fast.experts.options import ExpertOptions
from tests.commands.option_classes import COMMANDS

Row = tuple[str, object, object, str]
Flags = dict[str, object]

# ------------------------------------------------------------------ the public code's arguments

PUBLIC_DISTILL: dict[str, Row] = {
    # argument: (a value as users type it, the public default, ours, what a line says of the difference)
    "dataset": ("CIFAR100", "CIFAR10", "CIFAR10", ""),
    "subset": ("imagewoof", "imagenette", None, "has no effect without --dataset ImageNet"),
    "model": ("ConvNetD4", "ConvNet", "ConvNet", ""),
    "ipc": ("10", 1, 1, ""),
    "eval_mode": ("M", "S", "S", ""),
    "num_eval": ("3", 5, 5, ""),
    "eval_it": ("50", 100, 100, ""),
    "epoch_eval_train": ("300", 1000, None, ""),  # None: what the protocol says, 1000 by that of the public code
    "Iteration": ("100", 5000, 5000, ""),
    "lr_img": ("100", 1000, 1000.0, ""),
    "lr_lr": ("1e-07", 1e-05, 1e-05, ""),
    "lr_teacher": ("0.001", 0.01, 0.01, ""),
    "lr_init": ("0.02", 0.01, ..., "--lr_init is ignored: the public code does not use it either"),
    "batch_real": ("512", 256, 256, "--batch_real 512: the batch size of experts that are trained first"),
    "batch_syn": ("5", None, None, ""),
    "batch_train": ("128", 256, None, ""),  # None: what the protocol says, 256 by that of the public code
    "pix_init": ("noise", "real", "real", ""),
    "dsa": ("False", "True", True, "--dsa False leaves images as they are"),
    "dsa_strategy": ("color_crop", "color_crop_cutout_flip_scale_rotate", "color_crop_cutout_flip_scale_rotate", ""),
    "data_path": ("elsewhere", "data", "data", ""),
    "buffer_path": ("elsewhere", "./buffers", "buffers", ""),
    "expert_epochs": ("2", 3, 3, ""),
    "syn_steps": ("30", 20, 20, ""),
    "max_start_epoch": ("20", 25, 25, ""),
    "zca": ("", False, False, ""),
    "load_all": ("", False, ..., "--load_all is ignored: trajectories are memory-mapped"),
    "no_aug": ("True", False, False, ""),
    "texture": ("", False, False, ""),
    "canvas_size": ("3", 2, 2, "has no effect without --texture"),
    "canvas_samples": ("3", 1, 1, "has no effect without --texture"),
    "max_files": ("1", None, ..., "--max_files is ignored: there is one file an expert; limit them with --max_experts"),
    "max_experts": ("5", None, None, "--max_experts 5: of all experts, where the public code takes as many of each"),
    "force_save": ("", False, ..., "--force_save is ignored: pictures are always drawn"),
}
PUBLIC_BUFFER: dict[str, Row] = {
    **{
        name: PUBLIC_DISTILL[name]
        for name in ("dataset", "subset", "model", "dsa", "dsa_strategy", "data_path", "buffer_path", "zca")
    },
    "num_experts": ("20", 100, 100, ""),
    "lr_teacher": ("0.1", 0.01, 0.01, ""),
    "batch_train": ("128", 256, 256, ""),
    "batch_real": ("512", 256, ..., "--batch_real is ignored: it changes no expert in the public code either"),
    "train_epochs": ("100", 50, 50, ""),
    "decay": ("", False, False, ""),
    "mom": ("0.9", 0, 0.0, ""),
    "l2": ("0.0005", 0, 0.0, ""),
    "save_interval": ("10", 10, ..., "--save_interval is ignored: every expert is saved as soon as it is trained"),
}
"""All arguments of the public distill.py and buffer.py. Ours is ... where nothing is left to do for it."""


# ------------------------------------------------------------------ all flags


def ours(public: dict[str, Row]) -> Flags:
    """Return our defaults of the public arguments, without those that have nothing left to do."""
    return {name: default for name, (_, _, default, _) in public.items() if default is not ...}


_COMMON: Flags = {
    "dataset": "CIFAR10",
    "subset": None,
    "res": None,
    "data_path": "data",
    "packed_path": None,
    "download": False,
    "zca": False,
    "model": "ConvNet",
    "dsa": True,
    "dsa_strategy": "color_crop_cutout_flip_scale_rotate",
    "seed": 0,
    "device": "auto",
    "precision": "auto",
}
_TRAINING: Flags = _COMMON | {"networks_at_once": None}
_EVALUATION: Flags = _TRAINING | {
    "batch_train": None,
    "num_eval": 5,
    "epoch_eval_train": None,
    "eval_mode": "S",
    "protocol": "mtt",
    "best_epoch": False,
}
_EXPERTS: Flags = _TRAINING | {
    "train_epochs": 50,
    "mom": 0.0,
    "l2": 0.0,
    "decay": False,
    "rho_max": 0.0,
    "rho_min": None,
    "alpha": 0.0,
    "adaptive": True,
}
_SET: Flags = _EVALUATION | {
    "ipc": 1,
    "lr_teacher": None,
    "texture": False,
    "canvas_size": 2,
    "canvas_samples": 1,
    "label_kind": None,
    "distilled_share": 1.0,
    "factor": None,
    "other_data": False,
}
_BASELINE: Flags = _EVALUATION | {"out": None, "resume": False, "ipc": 1, "lr_net": 0.01}
_ONE_EXPERT: Flags = _BASELINE | {
    "buffer_path": "buffers",
    "train_epochs": 50,
    "expert_lr": 0.01,
    "mom": 0.0,
    "l2": 0.0,
    "decay": False,
    "labels": "classes",
    "label_epoch": None,
}
_ITERATIVE: Flags = _BASELINE | {"Iteration": 20000, "eval_it": 2000, "batch_real": 256, "save_seconds": 60.0}
_WINDOWS: Flags = {
    "lr_img": 0.001,
    "pix_init": "noise",
    "batch_real": 5000,
    "batch_per_class": 10,
    "task_sampler_nc": None,
    "totwindow": 200,
    "inner_lr": 0.001,
    "syn_strategy": "flip_rotate",
    "real_strategy": "flip_rotate",
    "clip_coef": 0.9,
    "train_y": False,
    "label_lr_scale": 1.0,
}
_LEARNED: Flags = _ITERATIVE | {"lr_img": 1.0, "pix_init": "real"}

FLAGS: dict[str, Flags] = {
    "distill": _EXPERTS
    | _EVALUATION
    | ours(PUBLIC_DISTILL)
    | {
        "recipe": None,
        "config": None,
        "out": None,
        "resume": False,
        "dry_run": False,
        "continuous_start": False,
        "noise_start": 0.0,
        "lr_decay": False,
        "min_start_epoch": 0,
        "current_max_start_epoch": None,
        "expansion_end_epoch": 0,
        "threshold": None,
        "lr_per_step": False,
        "mom_img": 0.5,
        "student_mom": 0.0,
        "student_dampening": 0.0,
        "student_l2": 0.0,
        "gradient": "exact",
        "match_step": "last",
        "loss_ratio": 0.0,
        "depth_ratio": 0.0,
        "num_trajectories": 1,
        "score_path": None,
        "score": "cscore",
        "window_start": 0.0,
        "distilled_share": 1.0,
        "msz_per_channel": None,
        "parametrisation": None,
        "parametrisation_options": "",
        "lr_y": None,
        "mom_y": 0.9,
        "label_init": "classes",
        "teacher_label": False,
        "ema_decay": None,
        "cam_model": None,
        "cam_interval": 100,
        "cam_beta": 1.0,
        "other_data": False,
        "num_experts": 100,
        "num_interpolation": None,
        "expert_lr": 0.01,
        "memory_budget": "auto",
        "microbatch": None,
        "save_seconds": 60.0,
    },
    "experts": _EXPERTS
    | ours(PUBLIC_BUFFER)
    | {
        "store_dtype": "float32",
        "sort_method": None,
        "init_ratio": 0.75,
        "add_end_epoch": 20,
        "rm_epoch_first": 40,
        "rm_epoch_second": 60,
        "rm_easy_ratio_first": 0.1,
        "rm_easy_ratio_second": 0.2,
    },
    "evaluate": _SET | {"source": "", "out": None},
    "cross": _SET | {"eval_mode": "M", "sources": (), "models": (), "out": "runs/cross"},
    "compress": {"folder": "", "num_interpolation": 4, "epochs": None, "smooth": True, "out": None},
    "convert": {
        "source": "",
        "destination": "",
        "from": None,
        "to": None,
        "dataset": None,
        "subset": None,
        "res": None,
        "data_path": "data",
        "packed_path": None,
        "download": False,
        "zca": False,
        "model": "ConvNet",
        "device": "auto",
        "lr_teacher": 0.01,
        "distilled_share": 1.0,
        "factor": None,
        "label_kind": None,
        "reorder": False,
        "hard_labels": False,
        "method": None,
        "measure": "last",
        "store_dtype": "float32",
        "experts_per_file": 10,
    },
    "grid": {"expert_epochs": "1,2,3", "syn_steps": "10,20,30", "out": "runs/grid", "resume": False},
    "distance": _EXPERTS
    | {
        "runs": (),
        "deltas": "10,20,50,100,200,500,1000,2000,5000",
        "steps": 1000,
        "starts": 1,
        "expert_lr": 0.01,
        "batch_real": 256,
        "out": "runs/distance",
    },
    "tables": {"runs": (), "out": "runs/tables"},
    "evolution": {"run": "", "out": None, "seconds": 0.3, "rows": 8},
    "score": {
        "full": None,
        "hard": None,
        "distilled": None,
        "random": None,
        "hlr": None,
        "ior": None,
        "weight": 0.5,
        "out": None,
    },
    "report": {"runs": (), "out": None},
    "recipes": {"words": ()},
    "random": _ONE_EXPERT,
    "herding": _ONE_EXPERT,
    "forgetting": _ONE_EXPERT,
    "kmeans": _ONE_EXPERT | {"pick": "nearest"},
    "dm": _LEARNED,
    "dc": _BASELINE
    | {
        "Iteration": 1000,
        "eval_it": 500,
        "batch_real": 256,
        "save_seconds": 60.0,
        "lr_img": 0.1,
        "pix_init": "noise",
        "dis_metric": "ours",
        "outer_loop": None,
        "inner_loop": None,
    },
    "dsa": _BASELINE
    | {
        "Iteration": 1000,
        "eval_it": 500,
        "batch_real": 256,
        "save_seconds": 60.0,
        "lr_img": 0.1,
        "pix_init": "real",
        "dis_metric": "ours",
        "outer_loop": None,
        "inner_loop": None,
    },
    "dd": _ITERATIVE
    | {
        "batch_real": 1024,
        "lr_img": 0.01,
        "pix_init": "noise",
        "decay_it": 2000,
        "decay_factor": 0.5,
        "distilled_images_per_class_per_step": 1,
        "distill_epochs": 3,
        "distill_lr": 0.02,
        "train_nets_type": "unknown_init",
        "n_nets": 1,
    },
    "ld": _ITERATIVE | {"batch_real": 1024, "inner_batch_size": 50, "inner_lr": 0.01, "lr_y": 0.001},
    "ratbptt": _ITERATIVE | _WINDOWS | {"window": 60, "minwindow": 0},
    "atbptt": _ITERATIVE | _WINDOWS | {"window": 40, "d": 10},
}
"""The default of every flag that a command takes; those that public arguments have are in the tables above."""


def test_every_command_is_here() -> None:
    assert set(FLAGS) == set(COMMANDS)


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_and_their_defaults_are_those_of_the_table(command: str) -> None:
    assert {field.flag: field.default for field in fields_of(COMMANDS[command]).values()} == FLAGS[command]


# ------------------------------------------------------------------ --help


def page(show: Callable[[], object]) -> str:
    """Return what `show` prints on a terminal that knows UTF-8 before it ends the process."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(terminal), pytest.raises(SystemExit) as end:
        show()
    assert not end.value.code
    terminal.seek(0)
    return terminal.read()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_a_command_without_docstrings(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check what python -OO shows, for which a dataclass makes a text of its fields."""
    kind = COMMANDS[command]
    expected = page(lambda: print_help(kind(), "python -m x"))
    monkeypatch.setattr(kind, "__doc__", f"{kind.__name__}(a: 'str' = '')")
    assert page(lambda: print_help(kind(), "python -m x")) == expected


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_every_flag_in_the_box_of_its_group(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = page(lambda: print_help(COMMANDS[command](), "python -m x"))
    boxes = re.findall(r"^╭─ (.*?) ─+╮$\n(.*?)^╰", text, re.M | re.S)
    shown = [(flag, title) for title, box in boxes for flag in re.findall(r"^│ --(\w+)", box, re.M)]
    fields = [field for field in fields_of(COMMANDS[command]).values() if not field.is_positional]
    titles = {group: "options" if group is Group.OTHER else f"{group.value} options" for group in Group}
    assert sorted(shown) == sorted((field.flag, titles[field.group]) for field in fields)
    in_order = list(dict.fromkeys(title for _, title in shown))
    assert in_order == [title for title in titles.values() if title in in_order]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_range(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # one box beside no other
    entries = re.split(r"^│ --", page(lambda: print_help(COMMANDS[command](), "python -m x")), flags=re.MULTILINE)
    shown = {re.split(r"\W", entry)[0]: " ".join(re.sub("│", " ", entry).split()) for entry in entries}
    for field in fields_of(COMMANDS[command]).values():
        for numbers in field.declarations(Range):
            assert str(numbers) in shown[field.flag], field.flag


def test_help_shows_the_defaults_that_the_other_flags_leave() -> None:
    digits = page(lambda: parse_options(["--out", "elsewhere", "--help"]))
    public = page(lambda: parse_options(["-h", "--dataset", "CIFAR10"]))
    assert "(default: digits)" in digits
    assert "(default: CIFAR10)" in public


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_stands_alone(command: str) -> None:
    """Check that a help text says what its option is without the texts beside it."""
    texts = help_texts(COMMANDS[command])
    assert set(texts) >= set(fields_of(COMMANDS[command]))
    for name, text in texts.items():
        assert not re.match(r"(of|its|their|it|they|where|how many|that|this|these|those|such|also|and)\b", text), name
        assert "\n" not in text


# ------------------------------------------------------------------ the public code's arguments


@pytest.mark.parametrize(
    ("kind", "name", "row"),
    [(DistillOptions, name, row) for name, row in PUBLIC_DISTILL.items()]
    + [(ExpertOptions, name, row) for name, row in PUBLIC_BUFFER.items()],
    ids=lambda value: value.__name__ if isinstance(value, type) else value if isinstance(value, str) else "",
)
def test_an_argument_of_the_public_code_is_read_or_explained(
    kind: type, name: str, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no images in data/
    typed, public, ours, difference = row
    options: Any

    words = [f"--{name}", *([typed] if typed else [])]
    caplog.set_level(logging.INFO)
    said = ""
    try:
        options = parsing.parse(kind, words, "")
    except InputError as error:
        said = str(error)
    else:
        said = "\n".join(caplog.messages)
        if ours is ...:
            assert options == kind()
        else:
            option_value = getattr(options, name)
            assert (
                option_value == type(option_value)(typed)
                if not isinstance(option_value, bool)
                else option_value is (typed in ("", "True"))
            )
            assert options == dataclasses.replace(kind(), **{name: option_value})
    assert difference in said
    assert bool(difference) == bool(said)
    if ours is ...:
        return
    default = getattr(kind(), name)
    assert default == ours
    same = (
        str(public) == str(default)
        or public == default
        or (name, default) in (("batch_train", None), ("epoch_eval_train", None), ("buffer_path", "buffers"))
    )
    assert same or difference


def test_the_public_codes_default_batch_is_the_protocols() -> None:
    assert DistillOptions().evaluation_protocol().batch_size == 256


def test_the_log_tells_where_the_public_code_means_something_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    parsing.parse(DistillOptions, ["--dataset", "ImageNet", "--no_aug", "False"], "")
    assert (
        "--dataset ImageNet without --subset is all of its classes; the public code takes imagenette" in caplog.messages
    )
    assert any(line.startswith("--no_aug False keeps the augmentation") for line in caplog.messages)
    caplog.clear()
    parsing.parse(DistillOptions, ["--dataset", "ImageNet", "--subset", "imagenette"], "")
    parsing.parse(ExpertOptions, "--dataset CIFAR100 --zca --save_interval 10 --batch_real 256".split(), "")
    assert [line.split(":")[0] for line in caplog.messages] == ["--batch_real is ignored", "--save_interval is ignored"]
