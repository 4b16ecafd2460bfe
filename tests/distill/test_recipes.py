"""Check recipes against the commands that the pages of the public codes give for the same settings."""

from __future__ import annotations

from typing import Any

import pytest

from mtt_fast.distill.options import DistillOptions
from mtt_fast.recipes import recipe_options

OF_NAME: dict[str, Any] = {"True": True, "ConvNetD3": "ConvNet"}  # ConvNet has depth 3

COMMANDS = {
    # GeorgeCazenavette/mtt-distillation, readme.md
    "cifar100-ipc1": "dataset=CIFAR100 ipc=1 syn_steps=20 expert_epochs=3 max_start_epoch=20 zca=True lr_img=1000 lr_lr=1e-05 "
    "lr_teacher=0.01",
    "imagefruit-ipc1": "dataset=ImageNet subset=imagefruit model=ConvNetD5 ipc=1 res=128 syn_steps=20 expert_epochs=2 "
    "max_start_epoch=10 lr_img=1000 lr_lr=1e-06 lr_teacher=0.01",
    # AngusDujw/FTD-distillation, distill/run_distill.sh
    "ftd-cifar10-ipc10": "dataset=CIFAR10 ipc=10 syn_steps=30 expert_epochs=2 max_start_epoch=20 zca=True lr_img=100 lr_lr=1e-05 "
    "lr_teacher=0.001 ema_decay=0.9995 Iteration=5000",
    "ftd-cifar100-ipc10": "dataset=CIFAR100 ipc=10 syn_steps=20 expert_epochs=2 max_start_epoch=40 zca=True lr_img=1000 lr_lr=1e-05 "
    "lr_teacher=0.01 ema_decay=0.9995 Iteration=5000",
    # NiaLiu/ATT, README.md
    "att-cifar10-ipc1": "dataset=CIFAR10 model=ConvNetD3 ipc=1 zca=True syn_steps=80 expert_epochs=4 max_start_epoch=2 lr_img=1e2 "
    "lr_lr=1e-07 lr_teacher=1e-2 ema_decay=0.9999 eval_it=100 Iteration=6000",
    "att-cifar10-ipc10": "dataset=CIFAR10 model=ConvNetD3 ipc=10 zca=True syn_steps=30 expert_epochs=2 max_start_epoch=20 lr_img=1e04 "
    "lr_lr=1e-04 lr_teacher=1e-02 ema_decay=0.9999 eval_it=100 Iteration=60000",
    "att-cifar10-ipc50": "dataset=CIFAR10 model=ConvNetD3 ipc=50 syn_steps=50 expert_epochs=2 max_start_epoch=40 lr_img=1e02 "
    "lr_lr=1e-05 lr_teacher=1e-03 ema_decay=0.999 eval_it=1000 Iteration=1000000",
    "att-cifar100-ipc1": "dataset=CIFAR100 model=ConvNetD3 ipc=1 zca=True syn_steps=50 expert_epochs=4 max_start_epoch=20 lr_img=500 "
    "lr_lr=1e-05 lr_teacher=1e-02 ema_decay=0.9995 eval_it=10 Iteration=3000",
    "att-cifar100-ipc10": "dataset=CIFAR100 model=ConvNetD3 ipc=10 syn_steps=20 expert_epochs=2 max_start_epoch=40 lr_img=1e3 "
    "lr_lr=1e-05 lr_teacher=1e-2 ema_decay=0.9995 eval_it=5000 Iteration=200000",
    "att-cifar100-ipc50": "dataset=CIFAR100 model=ConvNetD3 ipc=50 zca=True syn_steps=80 expert_epochs=2 max_start_epoch=40 lr_img=1e3 "
    "lr_lr=1e-05 lr_teacher=1e-2 ema_decay=0.999 eval_it=100000 Iteration=100000 batch_syn=1200",
    "att-tiny-ipc1": "dataset=Tiny model=ConvNetD4 ipc=1 syn_steps=30 expert_epochs=2 max_start_epoch=10 lr_img=1e04 lr_lr=1e-04 "
    "lr_teacher=1e-02 ema_decay=0.999 eval_it=10 Iteration=10000",
    # without its lr_lr=1e-06 and lr_teacher=1e-03, with which its table disagrees
    "att-tiny-ipc10": "dataset=Tiny model=ConvNetD4 ipc=10 syn_steps=20 expert_epochs=2 max_start_epoch=40 lr_img=1e04 "
    "lr_lr=1e-05 lr_teacher=1e-02 ema_decay=0.999 eval_it=100 Iteration=80000",
    "att-imagenette-ipc1": "dataset=ImageNet subset=imagenette res=128 model=ConvNetD5 ipc=1 syn_steps=20 expert_epochs=2 "
    "max_start_epoch=10 lr_img=1e4 lr_lr=5e-08 lr_teacher=1e-02 ema_decay=0.9999 eval_it=10 Iteration=10000",
    "att-imagenette-ipc10": "dataset=ImageNet subset=imagenette res=128 model=ConvNetD5 ipc=10 syn_steps=20 expert_epochs=2 "
    "max_start_epoch=10 lr_img=1e04 lr_lr=1e-04 lr_teacher=1e-2 ema_decay=0.999 eval_it=1000 Iteration=100000",
    # justincui03/tesla, README.md and the defaults of its parser; at half of its lr_img
    "tesla-cifar10-ipc1": "dataset=CIFAR10 ipc=1 syn_steps=50 expert_epochs=2 max_start_epoch=5 lr_img=500 lr_lr=1e-07 "
    "lr_teacher=0.01 Iteration=10000",
    "tesla-cifar100-ipc50": "dataset=CIFAR100 ipc=50 syn_steps=80 expert_epochs=2 max_start_epoch=40 lr_img=500 lr_lr=1e-05 "
    "lr_teacher=0.01 batch_syn=125 zca=True Iteration=10000",
    "tesla-imagenet-ipc1": "dataset=ImageNet res=64 ipc=1 syn_steps=10 expert_epochs=3 max_start_epoch=10 lr_img=5000 lr_lr=1e-04 "
    "lr_teacher=0.01 batch_syn=100 model=ConvNetD4 teacher_label=True Iteration=10000 num_experts=50",
    # Zhong0x29a/MCT, run_command.md and the defaults of distill_compressed.py; at half of its lr_img
    "mct-cifar10-ipc1": "dataset=CIFAR10 ipc=1 syn_steps=60 expert_epochs=6 max_start_epoch=4 lr_img=500 lr_lr=1e-07 lr_teacher=0.01 "
    "num_interpolation=4 continuous_start=True Iteration=5000",
    "mct-cifar10-ipc10": "dataset=CIFAR10 ipc=10 syn_steps=30 expert_epochs=15 max_start_epoch=8 lr_img=500 lr_lr=1e-05 lr_teacher=0.01 "
    "num_interpolation=4 continuous_start=True Iteration=5000",
    "mct-cifar10-ipc50": "dataset=CIFAR10 ipc=50 syn_steps=30 expert_epochs=2 max_start_epoch=40 lr_img=500 lr_lr=1e-05 lr_teacher=0.01 "
    "num_interpolation=4 continuous_start=True Iteration=5000",
    # sdh0818/FreD, ImageNet-abcde/scripts/run_TM_FreD.sh and hyper_params.py, under our names
    "fred-imagenet-a-ipc1": "dataset=ImageNet subset=imagenet-a res=128 model=ConvNetD5 ipc=8 msz_per_channel=2048 lr_img=1e9 "
    "syn_steps=20 expert_epochs=2 max_start_epoch=10 lr_lr=1e-06 lr_teacher=0.01 eval_it=500 Iteration=15000",
}
"""The flags of the public commands, without those of folders."""

OWN = {
    "ftd": {"rho_max", "rho_min", "alpha", "buffer_path"},
    "att": {"match_step", "batch_real", "buffer_path"},
    "tesla": {"gradient"},
    "mct": {"gradient"},
}
"""Options that are the method itself, or belong to its experts."""


def value_of(text: str) -> Any:
    """Return the value of a flag: a number, a name, or True."""
    try:
        return float(text)
    except ValueError:
        return OF_NAME.get(text, text)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_is_the_public_command(name: str) -> None:
    command = {flag: value_of(text) for flag, text in (each.split("=") for each in COMMANDS[name].split())}
    if "eval_it" in command:
        command["eval_it"] = max(command["eval_it"], DistillOptions.eval_it)
    own = OWN.get(name.split("-")[0], set())
    recipe = {option: value for option, value in recipe_options(name).items() if option not in own}
    options = DistillOptions(**recipe)
    assert {flag: getattr(options, flag) for flag in command} == command
    defaults = DistillOptions()
    assert {option for option, value in recipe.items() if value != getattr(defaults, option)} <= command.keys()


EDF = {  # of its configs/ImageNet: N, batch_syn, rates of pixels and labels, T, T+, the iteration of T+, threshold, ratio, interval
    "imagenette-ipc1": (40, None, 1e4, 2, 5, 10, 1000, 1.5, 0, 50),
    "imagenette-ipc10": (40, None, 1000, 2, 10, 20, 1000, 1.5, 0.25, 100),
    "imagenette-ipc50": (80, 128, 1000, 5, 20, 40, 2000, 1.5, 0.375, 200),
    "imagewoof-ipc1": (40, None, 1e4, 3, 5, 10, 1000, 2, 0, 50),
    "imagewoof-ipc10": (40, None, 1000, 3, 10, 20, 1000, 2, 0.25, 100),
    "imagewoof-ipc50": (40, 250, 100, 5, 20, 40, 2000, 1.5, 0.375, 200),
    "imagemeow-ipc1": (40, None, 1e4, 3, 5, 10, 1000, 2, 0, 50),
    "imagemeow-ipc10": (40, None, 1000, 2, 10, 20, 1000, 2, 0.25, 100),
    "imagemeow-ipc50": (80, 128, 100, 5, 20, 40, 2000, 1.1, 0.375, 100),
    "imageyellow-ipc1": (40, None, 1e4, 3, 5, 10, 1000, 1.5, 0, 50),
    "imageyellow-ipc10": (40, None, 1000, 3, 10, 20, 1000, 2, 0.25, 100),
    "imageyellow-ipc50": (40, 200, 100, 5, 20, 40, 1000, 1.5, 0.375, 200),
    "imagefruit-ipc1": (40, None, 1e4, 5, 20, 40, 1000, 1.1, 0.375, 100),
    "imagefruit-ipc10": (40, None, 1000, 5, 20, 40, 1000, 1.1, 0.375, 100),
    "imagefruit-ipc50": (80, 128, 100, 5, 20, 40, 1000, 1.1, 0.375, 100),
    "imagesquawk-ipc1": (40, None, 1e4, 3, 5, 10, 1000, 1.5, 0, 50),
    "imagesquawk-ipc10": (40, None, 1000, 3, 10, 20, 1000, 2, 0.25, 100),
    "imagesquawk-ipc50": (80, 128, 100, 5, 20, 40, 1000, 1.1, 0.5, 100),
}


@pytest.mark.parametrize("name", EDF)
def test_a_recipe_is_edfs_configuration(name: str) -> None:
    options: Any = DistillOptions(**recipe_options(f"edf-{name}"))
    assert (
        options.syn_steps, options.batch_syn, options.lr_img, options.lr_y,
        options.current_max_start_epoch, options.max_start_epoch, options.expansion_end_epoch,
        options.threshold, options.loss_ratio, options.cam_interval,
    ) == EDF[name]  # fmt: skip
    assert f"{options.subset}-ipc{options.ipc}" == name
    assert options.lr_lr == (1e-6 if name == "imagewoof-ipc10" else 1e-5)
    assert options.lr_teacher == (0.005 if name == "imagesquawk-ipc50" else 0.01)
    assert options.cam_beta == (2.0 if name in ("imagewoof-ipc10", "imagewoof-ipc50") else 1.0)


def test_experts_of_att_are_trained_in_its_batches() -> None:
    options = DistillOptions(**recipe_options("att-cifar10-ipc1"))
    assert (options.experts().batch_size, options.match_step) == (512, "nearest")
    others = {recipe_options(name).get("buffer_path") for name in COMMANDS if not name.startswith("att")}
    assert options.buffer_path not in others, "experts of other recipes are trained in batches of 256"
