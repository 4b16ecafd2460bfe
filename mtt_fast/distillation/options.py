"""The options of a distillation: the public code's flags, recipes, option files, and the run to resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtt_fast import cli
from mtt_fast.augment import augment_by_strategy
from mtt_fast.errors import InputError
from mtt_fast.experts import ExpertTraining, ExpertTrainingOptions
from mtt_fast.kernels import LabelKind
from mtt_fast.matching import MatchStep
from mtt_fast.memory import AUTO, parse_bytes
from mtt_fast.models.pools import eval_pool
from mtt_fast.options import EvaluationOptions, at_least
from mtt_fast.recipes import recipe_options
from mtt_fast.run_folder import check_same_method, read_config
from mtt_fast.texture import Canvas
from mtt_fast.unroll import Gradient

PROGRAM = "python -m mtt_fast.distill"
DEFAULT_RECIPE = "digits"


@dataclass(frozen=True)
class DistillOptions(ExpertTrainingOptions, EvaluationOptions):
    """Distil a data set into a few synthetic images a class. Without --dataset or --recipe: the digits recipe."""

    recipe: str | None = None
    """a named setting (python -m mtt_fast.recipes lists them); other flags override it"""
    config: str | None = None
    """a TOML file of options; other flags override it"""
    out: str | None = None
    """run folder; default runs/RECIPE, or runs/DATASET-ipcN"""
    resume: bool = False
    """continue the run in --out (or that of --recipe), with its own options; say --Iteration to extend it"""

    dry_run: bool = False
    """tell what would be done, the memory plan, and an estimate of time and disk; do nothing"""

    ipc: int = 1
    """synthetic images a class"""
    Iteration: int = 5000
    """iterations (updates of the images)"""
    syn_steps: int = 20
    """N: student steps in each iteration"""
    expert_epochs: int = 3
    """M: expert epochs that the student has to match"""
    max_start_epoch: int = 25
    """T+: the student starts at an expert epoch below this"""
    continuous_start: bool = False
    """the student starts at any real number of epochs, not at whole ones alone (MCT); between recorded ones on a straight line"""
    min_start_epoch: int = 0
    """T-: and not before this one (DATM)"""
    current_max_start_epoch: int | None = None
    """T: in the first iteration, in place of max_start_epoch, which is approached linearly (DATM)"""
    expansion_end_epoch: int = 0
    """iteration from which on max_start_epoch counts, where current_max_start_epoch is given"""
    threshold: float | None = None
    """make no update in an iteration whose matching loss is above this (DATM)"""
    batch_syn: int | None = None
    """synthetic images in a student step; without it, all of them"""
    lr_img: float = 1000.0
    """learning rate of the pixels"""
    lr_lr: float = 1e-5
    """learning rate of the student's learning rate"""
    lr_teacher: float = 0.01
    """the student's learning rate at the start"""
    lr_per_step: bool = False
    """learn one learning rate for each of the student's steps; networks are evaluated at their mean"""
    student_mom: float = 0.0
    """momentum of the student's steps"""
    student_l2: float = 0.0
    """their weight decay"""
    gradient: Gradient = "exact"
    """exact, or truncated: TESLA's, an approximation without the Hessian terms, compared with the exact one at evaluations"""
    match_step: MatchStep = "last"
    """match the student's last step, or the one nearest to the expert (ATT)"""
    loss_ratio: float = 0.0
    """leave this share of the parameters, those of lowest loss, out of the matching loss (PAD)"""
    num_trajectories: int = 1
    """segments that each iteration matches, of one expert after the other; their gradients are averaged"""
    pix_init: Literal["real", "noise", "samples_predicted_correctly"] = "real"
    """start from random real images, from noise, or from real images that experts classify correctly (DATM)"""
    lr_y: float | None = None
    """learn soft labels, kept as logits, at this learning rate (DATM); without it the labels are the classes"""
    mom_y: float = 0.9
    """their momentum"""
    label_init: Literal["classes", "experts"] = "classes"
    """they start from probability 0.9 for the image's class, or from the mean logits of the experts that are right (DATM)"""
    teacher_label: bool = False
    """label the images in each iteration as the expert to be matched does (TESLA); labels that are saved are the mean of
    what all experts say after max_start_epoch epochs"""
    ema_decay: float | None = None
    """also average the images over the iterations, with this weight on what was (FTD), and evaluate that"""
    no_aug: bool = False
    """no augmentation during distillation (evaluation keeps it)"""
    texture: bool = False
    """distil textures: canvases that tile without seams, of which each student step sees random crops"""
    canvas_size: int = 2
    """side of a canvas, in images"""
    canvas_samples: int = 1
    """crops of each canvas in a student step"""

    eval_it: int = 100
    """iterations between evaluations"""

    buffer_path: str = "buffers"
    """where the experts' trajectories are"""
    other_data: bool = False
    """use experts that were trained on other images, of the same classes and size"""
    num_experts: int = 100
    """experts to train if there are fewer; beside experts from elsewhere none is trained"""
    max_experts: int | None = None
    """use only so many experts"""
    num_interpolation: int | None = None
    """use the experts as so many waypoints with straight lines between them (MCT: 4), compressing those that are not"""
    expert_lr: float = 0.01
    """learning rate of experts that are trained first"""
    batch_real: int = 256
    """their batch size"""

    memory_budget: str = AUTO
    """cut student batches so that an iteration stays below this, e.g. 6GiB; auto: most of what is free; the result is the same"""
    microbatch: int | None = None
    """cut student batches into pieces of so many images; the result is the same"""
    save_seconds: float = 60.0
    """time between checkpoints"""

    def folder(self) -> Path:
        """Return the run folder."""
        return Path(
            self.out or Path("runs") / (self.recipe or f"{Path(self.subset or self.dataset).name}-ipc{self.ipc}")
        )

    def experts(self) -> ExpertTraining:
        """Return how missing experts are trained."""
        return self.training_at(self.expert_lr, self.batch_real)

    @property
    def label_kind(self) -> LabelKind:
        """What the student's labels are."""
        if self.lr_y is not None:
            return "logits"
        return "probabilities" if self.teacher_label else "indices"

    @property
    def canvas(self) -> Canvas | None:
        """How steps see the images of --texture."""
        return Canvas(self.canvas_size, self.canvas_samples) if self.texture else None

    @property
    def tiles(self) -> int:
        """How many real images each synthetic one is as large as: more than one for a canvas."""
        return self.canvas_size**2 if self.texture else 1

    def check(self) -> None:
        """Raise `InputError` for the first option that cannot be."""
        complaint = at_least(
            1,
            ipc=self.ipc,
            syn_steps=self.syn_steps,
            num_trajectories=self.num_trajectories,
            expert_epochs=self.expert_epochs,
            max_start_epoch=self.max_start_epoch,
            batch_syn=self.batch_syn,
            canvas_size=self.canvas_size,
            canvas_samples=self.canvas_samples,
            eval_it=self.eval_it,
            num_experts=self.num_experts,
            max_experts=self.max_experts,
            microbatch=self.microbatch,
            networks_at_once=self.networks_at_once,
        ) or at_least(
            0,
            Iteration=self.Iteration,
            lr_img=self.lr_img,
            lr_lr=self.lr_lr,
            lr_y=self.lr_y,
            min_start_epoch=self.min_start_epoch,
            expansion_end_epoch=self.expansion_end_epoch,
            student_l2=self.student_l2,
            save_seconds=self.save_seconds,
        )
        complaint = complaint or at_least(2, num_interpolation=self.num_interpolation)
        if complaint:
            raise InputError(complaint)
        if not 0 < self.lr_teacher < math.inf:
            raise InputError(f"--lr_teacher {self.lr_teacher}: expected more than 0")
        for name in ("student_mom", "loss_ratio", "mom_y", "ema_decay"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise InputError(f"--{name} {share}: expected at least 0 and less than 1")
        self._check_start_epochs()
        if self.threshold is not None and not self.threshold > 0:
            raise InputError(f"--threshold {self.threshold}: expected more than 0")
        if self.teacher_label and self.lr_y is not None:
            raise InputError("--teacher_label, --lr_y: expected one of them, found both: labels are given, or learned")
        if self.label_init == "experts" and self.lr_y is None:
            raise InputError(
                "--label_init experts: expected --lr_y with it (0 keeps the labels as the experts gave them)"
            )
        if self.memory_budget != AUTO:
            parse_bytes(self.memory_budget)
            if self.microbatch is not None:
                raise InputError("--microbatch, --memory_budget: expected one of them, found both")
        if self.texture:
            self._check_texture()
        augment_by_strategy(self.strategy)
        self.experts()
        self.evaluation_protocol()
        eval_pool(self.eval_mode, self.model)

    @property
    def looks_at_last_epochs(self) -> bool:
        """Whether images or labels come from what experts say after their last epoch."""
        return self.pix_init == "samples_predicted_correctly" or self.label_init == "experts"

    def asks_experts(self) -> str | None:
        """Return the first option for which experts classify images, or None."""
        options = {
            "--pix_init samples_predicted_correctly": self.pix_init == "samples_predicted_correctly",
            "--label_init experts": self.label_init == "experts",
            "--teacher_label": self.teacher_label,
        }
        return next((option for option, given in options.items() if given), None)

    def _check_start_epochs(self) -> None:
        """Raise `InputError` where T- < T <= T+ does not hold, or T and the end of its growth are not given together."""
        earliest, first, last = self.min_start_epoch, self.current_max_start_epoch, self.max_start_epoch
        if first is None and self.expansion_end_epoch:
            raise InputError(
                f"--expansion_end_epoch {self.expansion_end_epoch}: expected --current_max_start_epoch with it, from which "
                "--max_start_epoch is approached"
            )
        if first is not None and not self.expansion_end_epoch:
            raise InputError(
                f"--current_max_start_epoch {first}: expected with it the iteration at which --max_start_epoch {last} is "
                "reached, --expansion_end_epoch"
            )
        if first is not None and first > last:
            raise InputError(f"--current_max_start_epoch {first}: expected at most --max_start_epoch {last}")
        name, bound = ("max", last) if first is None else ("current_max", first)
        if earliest >= bound:
            raise InputError(f"--min_start_epoch {earliest}: expected less than --{name}_start_epoch {bound}")

    def _check_texture(self) -> None:
        """Raise `InputError` for what needs images of the size that networks and the whitening take, as canvases are not."""
        others = {
            "--zca": self.zca,
            "--teacher_label": self.teacher_label,
            "--label_init experts": self.label_init == "experts",
        }
        for other, given in others.items():
            if given:
                raise InputError(
                    f"--texture, {other}: expected one of them, found both; a canvas is larger than an image"
                )


NOT_PART_OF_THE_RESULT = {
    "recipe", "config", "out", "resume", "dry_run", "Iteration", "eval_it", "num_eval", "epoch_eval_train", "batch_train",
    "eval_mode", "protocol", "best_epoch", "download", "data_path",
    "packed_path",
    "buffer_path", "device", "networks_at_once", "memory_budget", "microbatch", "save_seconds", "num_experts", "max_experts",
    "train_epochs", "other_data",
}  # fmt: skip
"""Options that may differ when a run goes on: the result does not depend on them, or, of experts, they are compared with those
that the run began with."""


@dataclass(frozen=True)
class _Selection:
    """The flags that decide where the other options' defaults come from."""

    recipe: str | None = None
    config: str | None = None
    out: str | None = None
    resume: bool = False
    dataset: str | None = None


def parse_options(argv: Sequence[str]) -> DistillOptions:
    """Return the options of a command line: defaults, then the recipe or the run to resume, then --config, then flags.

    The recipe may also be named in the file of --config.
    """
    chosen, in_file = _selection(argv)
    defaults: dict[str, Any] = {}
    if chosen.resume:
        folder = Path(chosen.out) if chosen.out else Path("runs") / str(chosen.recipe)
        config = read_config(folder)
        if config is None:
            raise InputError(
                f"--resume: there is no run in {folder}; name its folder with --out, or start it without --resume"
            )
        check_same_method(folder, None)
        defaults |= config | {"resume": True, "out": str(folder)}
    elif chosen.recipe is not None:
        defaults |= recipe_options(chosen.recipe) | {"recipe": chosen.recipe}
    defaults |= in_file
    options = cli.parse(DistillOptions, argv, PROGRAM, defaults)
    options.check()
    return options


def given_options(argv: Sequence[str]) -> set[str]:
    """Return the names of the options that a command line gives, or its recipe or file of options; not those of a run."""
    chosen, in_file = _selection(argv)
    recipe = {} if chosen.resume or chosen.recipe is None else recipe_options(chosen.recipe)
    return {*recipe, *in_file, *cli.given(DistillOptions, argv)}


def _selection(argv: Sequence[str]) -> tuple[_Selection, dict[str, Any]]:
    """Return what decides where defaults come from, and the options in the file of --config."""
    chosen = cli.parse_known(_Selection, argv, PROGRAM)
    in_file = cli.read_toml(Path(chosen.config)) if chosen.config is not None else {}
    if chosen.recipe is None and isinstance(in_file.get("recipe"), str):
        chosen = dataclasses.replace(chosen, recipe=in_file["recipe"])
    if chosen.recipe is None and chosen.config is None and chosen.dataset is None and chosen.out is None:
        chosen = dataclasses.replace(chosen, recipe=DEFAULT_RECIPE)
    return chosen, in_file
