"""Define the options of a distillation: the flags of the public code and of its successors, and which of them fit together."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands.option_fields import MAY_BE_EMPTY, Checked, Group, Needs, Remark, Role, fields_of
from mtt_fast.commands.options import (
    AtLeastTwo,
    Count,
    CountFromZero,
    EvaluationOptions,
    Networks,
    NonNegative,
    Positive,
    PositiveOrInfinity,
    PositiveShare,
    Seconds,
    Share,
)
from mtt_fast.data import DatasetInfo, ImageData
from mtt_fast.data.set_checks import distilled_in_class
from mtt_fast.engine.matching import MatchStep
from mtt_fast.engine.memory_plan import check_budget
from mtt_fast.engine.sweeps import Gradient
from mtt_fast.errors import InputError
from mtt_fast.experts.options import ExpertTrainingOptions
from mtt_fast.kernels import LabelKind
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.memory_info import AUTO
from mtt_fast.storage.run_files import last_name
from mtt_fast.training.experts import ExpertTraining

PROGRAM = "python -m mtt_fast.distill"
DEFAULT_RECIPE = "digits"
HALVED_AFTER = 2000
"""Iterations after which --lr_decay halves the rate of the images, as in MCT's code."""


@dataclass(frozen=True)
class DistillOptions(ExpertTrainingOptions, EvaluationOptions):
    """Distil a data set into a few synthetic images per class.

    In each iteration a student, a network, takes a few training steps on the synthetic images from the parameters of an expert, a network
    that was trained on the real images. The images are updated so that the student arrives where the expert did.

    Without --dataset and --recipe: the digits recipe. With --recipe NAME --help the page shows the defaults of that recipe.
    """

    GROUP: ClassVar[Group] = Group.DISTILLATION
    RENAMED: ClassVar[dict[str, str]] = {
        "lr_freq": "lr_img",
        "loss_threshold": "loss_ratio",
        "initialize": "pix_init",
        "num_scm": "ipc",
        "lr_scm": "lr_img",
        "lr_nf": "lr_img",
        "dipc": "ipc",
        "momentum": "student_mom",
        **dict.fromkeys(
            (
                *("num_saet", "dim_saet", "num_head", "top_k", "l1_weight", "patch_size", "lr_saet", "lr_freenet"),
                *("num_layers", "layer_size", "w0_initial", "w0", "epochs_init", "lr_nf_init"),
            ),
            "parametrisation_options",
        ),
        "beta": "window_start",
    }
    """Flags of the successors' codes (FreD, EDF, SelMatch, SPEED, DDiF) that have another name here."""

    recipe: Annotated[str | None, Role.LOCATION, Group.RUN] = None
    """named setting (python -m mtt_fast.recipes lists them); other flags override it"""
    config: Annotated[str | None, Role.LOCATION, Group.RUN] = None
    """TOML file of options; other flags override it"""
    out: Annotated[str | None, Role.LOCATION, Group.OUTPUT] = None
    """run folder; if not given, runs/RECIPE or runs/DATASET-ipcN"""
    resume: Annotated[bool, Role.LOCATION, Group.OUTPUT] = False
    """continue the run in --out (or of --recipe) with the options it started with; a larger --Iteration extends it"""

    dry_run: Annotated[bool, Role.LOCATION, Group.RUN] = False
    """only print what the run would do, with the memory plan and an estimate of time and disk space"""

    ipc: Count = 1
    """synthetic images per class"""
    Iteration: Annotated[CountFromZero, Role.EXTENT] = 5000
    """iterations (updates of the images)"""
    syn_steps: Count = 20
    """N: student steps in each iteration"""
    expert_epochs: Count = 3
    """M: number of expert epochs that the student must match"""
    max_start_epoch: Count = 25
    """T+: the student starts at a random expert epoch below this"""
    continuous_start: bool = False
    """the student also starts between two epochs, at a point on the straight line between their parameters (MCT)"""
    noise_start: NonNegative = 0.0
    """multiply the parameters from which the student starts by 1 plus Gaussian noise of this standard deviation (MCT)"""
    min_start_epoch: CountFromZero = 0
    """T-: earliest expert epoch at which the student starts (DATM)"""
    current_max_start_epoch: Count | None = None
    """T: upper bound of the start epoch in the first iteration; it grows linearly to --max_start_epoch (DATM)"""
    expansion_end_epoch: Annotated[CountFromZero, Needs("current_max_start_epoch")] = 0
    """iteration at which the bound of --current_max_start_epoch has grown to --max_start_epoch"""
    threshold: PositiveOrInfinity | None = None
    """skip the update of an iteration whose matching loss is above this (DATM); if not given, or inf, no update is skipped"""
    batch_syn: Count | None = None
    """synthetic images per student step; if not given, all synthetic images"""
    lr_img: NonNegative = 1000.0
    """learning rate of the pixels, of the frequencies of --msz_per_channel (FreD's lr_freq), or of the parameters of --parametrisation;
    0 keeps them fixed"""
    mom_img: Share = 0.5
    """momentum of the images (or of the values learned in their place, unless Adam updates these, as in DDiF), and of the student's
    learning rate (SPEED: 0.95)"""
    lr_decay: bool = False
    """halve --lr_img after every 2,000 iterations (MCT)"""
    lr_lr: NonNegative = 1e-5
    """learning rate of the student's learning rate; 0 keeps that rate fixed"""
    lr_teacher: Positive = 0.01
    """initial learning rate of the student"""
    lr_per_step: bool = False
    """learn a separate learning rate for each student step; evaluations use their mean"""
    student_mom: Share = 0.0
    """momentum of the student's steps"""
    student_dampening: Annotated[Share, Needs("student_mom")] = 0.0
    """multiply the gradients in the student's momentum by 1 minus this, in all steps (SPEED: 0.9)"""
    student_l2: NonNegative = 0.0
    """weight decay of the student's steps"""
    gradient: Gradient = "exact"
    """gradient of the matching loss. exact: through all student steps; truncated: TESLA's approximation without the Hessian terms, compared
    with the exact one at each evaluation"""
    match_step: MatchStep = "last"
    """student step that is matched. last: the last one; nearest: the one nearest to the expert (ATT)"""
    loss_ratio: Share = 0.0
    """fraction of the parameters, those with the lowest loss, to leave out of the matching loss (EDF)"""
    depth_ratio: Share = 0.0
    """fraction of the parameters, the first ones, to leave out of the matching loss: those of the first layers (PAD)"""
    num_trajectories: Count = 1
    """number of expert segments that each iteration matches; the gradients are averaged"""
    pix_init: Literal["real", "noise", "samples_predicted_correctly", "window"] = "real"
    """initial images: random real images, noise, real images that experts classify correctly (DATM), or real images of a window of
    difficulty (SelMatch)"""
    score_path: Annotated[str | None, Role.LOCATION] = None
    """file with the difficulty of each training image, for --pix_init window: .npy, or .npz with an array "scores", as in SelMatch's
    scores/"""
    score: Annotated[Literal["cscore", "forgetting"], Needs("score_path")] = "cscore"
    """meaning of the scores. cscore: from 0 for the hardest images to 1; forgetting: whole numbers, higher for harder images"""
    window_start: Annotated[NonNegative, Needs("score_path")] = 0.0
    """the hardest images of each class that --pix_init window leaves out, as a multiple of --ipc (SelMatch's beta)"""
    distilled_share: PositiveShare = 1.0
    """share of each class's images that is distilled (SelMatch's alpha); the remaining ones, at the end of the class, keep their pixels, and
    their labels unless --teacher_label labels all images"""
    msz_per_channel: Count | None = None
    """distil this number of frequencies of each channel instead of all pixels: those in which the initial images of a class differ most
    (FreD)"""
    parametrisation: str | None = None
    """learn the parameters from which the images are computed, in place of their pixels. ddif: a neural field for each image (DDiF);
    speed: sparse combinations of tokens (SPEED); FILE.py:CLASS or MODULE:CLASS: a class of your own that inherits mtt_fast.Parametrisation"""
    parametrisation_options: Annotated[str, Needs("parametrisation"), MAY_BE_EMPTY] = ""
    """arguments of --parametrisation, separated by spaces, e.g. "num_saet=64 dim_saet=96"; a value with spaces is quoted, as in
    "path='my net.pt'" """
    lr_y: Annotated[NonNegative | None, Group.LABELS] = None
    """learn soft labels, stored as logits, with this learning rate (DATM); 0 keeps the initial soft labels; if not given, the labels are
    the classes"""
    mom_y: Annotated[Share, Needs("lr_y"), Group.LABELS] = 0.9
    """momentum of the learned labels"""
    label_init: Annotated[
        Literal["classes", "experts"], Needs("lr_y", " (0 keeps the labels as they begin)"), Group.LABELS
    ] = "classes"
    """initial soft labels. classes: probability 0.9 for the image's class; experts: mean logits of the experts that classify the image correctly (DATM)"""
    teacher_label: Annotated[bool, Group.LABELS] = False
    """in each iteration, label the images by the expert that is matched (TESLA); the saved labels are the mean over all experts after
    --max_start_epoch epochs"""
    ema_decay: Share | None = None
    """decay of an exponential moving average of the images (FTD); the average is evaluated too"""
    cam_model: str | None = None
    """weight the gradients of the pixels by Grad-CAM maps of this network, such as ResNet18; it is trained like an expert (EDF)"""
    cam_interval: Annotated[Count, Needs("cam_model")] = 100
    """iterations between updates of the maps of --cam_model"""
    cam_beta: Annotated[NonNegative, Needs("cam_model")] = 1.0
    """offset of the weights: the gradient of a pixel where the map of --cam_model (0 to 1) is at least its mean is multiplied by the map
    plus this; other pixels have weight 1"""
    no_aug: Annotated[bool, Needs("dsa", " True"), Group.AUGMENTATION] = False
    """do not augment during distillation; evaluations still augment"""
    texture: Annotated[bool, Group.TEXTURE] = False
    """distil textures: canvases that tile without seams; each student step uses random crops of them"""
    canvas_size: Annotated[Count, Needs("texture"), Group.TEXTURE] = 2
    """side length of a canvas of --texture, in images"""
    canvas_samples: Annotated[Count, Needs("texture"), Group.TEXTURE] = 1
    """crops of each canvas of --texture per student step"""

    eval_it: Annotated[Count, Role.EXTENT, Group.EVALUATION] = 100
    """iterations between evaluations"""

    buffer_path: Annotated[str, Role.LOCATION, Group.EXPERTS] = "buffers"
    """folder of the experts' trajectories"""
    other_data: Annotated[bool, Role.EXTENT, Group.EXPERTS] = False
    """use experts that were trained on other images, of the same classes and size"""
    num_experts: Annotated[Networks, Role.EXTENT, Group.EXPERTS] = 100
    """number of experts; missing ones are trained first, unless the folder already has --max_experts. In a folder of converted experts
    none is trained"""
    max_experts: Annotated[
        Networks | None,
        Role.EXTENT,
        Group.EXPERTS,
        Remark("of all experts, where the public code takes as many of each of its files"),
    ] = None
    """match at most this many experts, the first ones; if not given, all in the folder, even if there are more than --num_experts"""
    num_interpolation: Annotated[AtLeastTwo | None, Group.EXPERTS] = None
    """replace each expert by this many waypoints with straight lines between them (MCT: 4); experts are compressed first if needed"""
    expert_lr: Annotated[Positive, Group.EXPERTS] = 0.01
    """learning rate of experts that this command trains"""
    batch_real: Annotated[
        Count,
        Group.EXPERTS,
        Remark("the batch size of experts that are trained first; in the public code it changes nothing"),
    ] = 256
    """batch size of experts that this command trains"""

    memory_budget: Annotated[str, Role.MACHINE, Group.MACHINE, Checked(check_budget)] = AUTO
    """memory limit of an iteration, e.g. 6GiB: student batches are cut into pieces that fit; auto: most of the free memory. The result is the same up
    to rounding"""
    microbatch: Annotated[Count | None, Role.MACHINE, Group.MACHINE] = None
    """cut student batches into pieces of this many images. The result is the same up to rounding"""
    save_seconds: Seconds = 60.0
    """seconds between checkpoints; inf: save only at evaluations and at the end"""

    def folder(self) -> Path:
        """Return the run folder."""
        return Path(
            self.out or Path("runs") / (self.recipe or f"{last_name(self.subset or self.dataset)}-ipc{self.ipc}")
        )

    def experts(self) -> ExpertTraining:
        """Return the hyperparameters with which missing experts are trained."""
        return self.training_at(self.expert_lr, self.batch_real)

    def cam_network(self, data: ImageData | DatasetInfo) -> Trainable | None:
        """Return the network whose Grad-CAM maps weigh the pixels' gradients, for `data`, or None."""
        if self.cam_model is None:
            return None
        return network_by_name(self.cam_model, data.image_shape, data.num_classes, option="cam_model")

    @property
    def label_kind(self) -> LabelKind:
        """Return the kind of the student's labels."""
        if self.lr_y is not None:
            return "logits"
        return "probabilities" if self.teacher_label else "indices"

    @property
    def last_matched_epoch(self) -> int:
        """Return the last epoch that segments reach; experts must have been trained so long."""
        last_start = self.max_start_epoch if self.continuous_start else self.max_start_epoch - 1
        return last_start + self.expert_epochs

    @property
    def distilled_per_class(self) -> int:
        """Return how many images of each class, the first ones, are distilled; the others stay real images."""
        return distilled_in_class(self.ipc, self.distilled_share)

    @property
    def window_start_image(self) -> int:
        """Return how many of the hardest images of each class come before the window of `pix_init`."""
        return int(self.ipc * self.window_start)

    @property
    def canvas(self) -> Canvas | None:
        """Return the canvas of --texture, whose crops are the inputs of steps, or None."""
        return Canvas(self.canvas_size, self.canvas_samples) if self.texture else None

    @property
    def num_tiles(self) -> int:
        """Return the number of real images that a synthetic image is tiled from: more than one for a canvas."""
        return self.canvas_size**2 if self.texture else 1

    def remarks(self, given: Container[str]) -> list[str]:
        """See `CommonOptions.remarks`."""
        remarks, first = super().remarks(given), self.current_max_start_epoch
        if self.recipe == DEFAULT_RECIPE and not self.resume and "recipe" not in given and "dataset" not in given:
            remarks.append("without --dataset and --recipe: the digits recipe; the public code takes CIFAR10")
        if "no_aug" in given and not self.no_aug:
            remarks.append(
                "--no_aug False keeps the augmentation; the public code's parser reads any word after --no_aug as True"
            )
        if first is not None and first < self.max_start_epoch and 0 < self.Iteration < self.expansion_end_epoch:
            remarks.append(
                f"--expansion_end_epoch {self.expansion_end_epoch} is beyond --Iteration {self.Iteration}: the bound on the start "
                f"epoch, {first} at first, does not reach --max_start_epoch {self.max_start_epoch}"
            )
        return [*remarks, *self._remarks_without_effect()]

    def _remarks_without_effect(self) -> list[str]:
        """Return remarks on options that have no effect, given the values of others."""
        halves = f"--Iteration {self.Iteration} and --lr_img {self.lr_img:g}: it halves the rate after every {HALVED_AFTER:,} iterations"
        fixed, single = "--lr_img 0, which keeps the pixels", "--syn_steps 1, a single step"
        without_effect = (
            ("lr_decay", self.lr_decay and (self.Iteration <= HALVED_AFTER or not self.lr_img), halves),
            (f"cam_model {self.cam_model}", self.cam_model is not None and not self.lr_img, fixed),
            (f"ema_decay {self.ema_decay}", self.ema_decay is not None and not self.lr_img, fixed),
            (
                f"mom_y {self.mom_y}",
                self.lr_y == 0 and self.mom_y != DistillOptions.mom_y,
                "--lr_y 0, which keeps the labels",
            ),
            (f"match_step {self.match_step}", self.match_step == "nearest" and self.syn_steps == 1, single),
            (f"student_mom {self.student_mom}", self.student_mom > 0 and self.syn_steps == 1, single),
            ("lr_per_step", self.lr_per_step and self.syn_steps == 1, single),
            ("lr_per_step", self.lr_per_step and self.lr_lr == 0, "--lr_lr 0, which keeps all rates"),
            (f"gradient {self.gradient}", self.gradient == "truncated" and self.syn_steps == 1, single),
            (
                "no_aug",
                self.no_aug and self.strategy.lower() == "none",
                "--dsa_strategy none, which augments no images",
            ),
            (
                f"mom_img {self.mom_img}",
                self.mom_img != DistillOptions.mom_img and self.lr_img == self.lr_lr == 0,
                "--lr_img 0 and --lr_lr 0, which keep pixels and rate",
            ),
            (
                f"pix_init {self.pix_init}",
                self.parametrisation == "speed" and self.pix_init != DistillOptions.pix_init,
                "--parametrisation speed, which begins with random tokens",
            ),
            (
                f"current_max_start_epoch {self.current_max_start_epoch}",
                self.current_max_start_epoch == self.max_start_epoch,
                "--max_start_epoch of the same value",
            ),
            (
                f"window_start {self.window_start}",
                self.window_start > 0 and not self.window_start_image,
                f"--ipc {self.ipc}: together they leave out less than one image of a class",
            ),
        )
        return [f"--{option} has no effect at {reason}" for option, applies, reason in without_effect if applies]

    def check(self) -> None:
        """Raise `InputError` for the first values that do not fit each other. Single values are checked when they are parsed."""
        self._check_start_epochs()
        if self.teacher_label and self.lr_y is not None:
            raise _found_both("--teacher_label", "--lr_y", "the labels either come from experts or are learned")
        if self.loss_ratio and self.depth_ratio:
            raise InputError(
                f"--loss_ratio {self.loss_ratio:g}, --depth_ratio {self.depth_ratio:g}: expected one of them, found both, as in PAD's "
                "configurations, of which each script reads one; set the other to 0"
            )
        if self.label_init == "experts" and self.lr_y is None:
            raise InputError("--label_init experts: expected --lr_y with it (0 keeps the initial labels)")
        if self.memory_budget != AUTO and self.microbatch is not None:
            raise _found_both("--microbatch", "--memory_budget", "either decides on the pieces of a batch")
        if self.texture:
            self._check_texture()
        self._check_window()
        self._check_frequencies()
        self._check_parametrisation()
        self.experts()
        self.evaluation_protocol()

    @property
    def uses_last_epochs(self) -> bool:
        """Return whether images or labels come from the experts' predictions after their last epoch."""
        return self.pix_init == "samples_predicted_correctly" or self.label_init == "experts"

    def option_using_experts(self) -> str | None:
        """Return the first option for which experts classify images, or None."""
        options = {
            "--pix_init samples_predicted_correctly": self.pix_init == "samples_predicted_correctly",
            "--label_init experts": self.label_init == "experts",
            "--teacher_label": self.teacher_label,
        }
        return next((option for option, given in options.items() if given), None)

    def _check_start_epochs(self) -> None:
        """Raise `InputError` unless T- < T <= T+, and T and the end of its growth are given together."""
        earliest, first, last = self.min_start_epoch, self.current_max_start_epoch, self.max_start_epoch
        if first is None and self.expansion_end_epoch:
            raise InputError(
                f"--expansion_end_epoch {self.expansion_end_epoch}: expected --current_max_start_epoch with it, the bound "
                "in the first iteration"
            )
        if first is not None and not self.expansion_end_epoch:
            raise InputError(
                f"--current_max_start_epoch {first}: expected --expansion_end_epoch with it, the iteration at which the "
                f"bound reaches --max_start_epoch {last}"
            )
        if first is not None and first > last:
            raise InputError(f"--current_max_start_epoch {first}: expected at most --max_start_epoch {last}")
        name, bound = ("max", last) if first is None else ("current_max", first)
        if earliest >= bound:
            raise InputError(f"--min_start_epoch {earliest}: expected less than --{name}_start_epoch {bound}")

    def _check_window(self) -> None:
        """Raise `InputError` unless a window has scores, and each class an image that is distilled."""
        if self.pix_init == "window" and self.score_path is None:
            raise InputError(
                "--pix_init window: expected --score_path with it, the file with the difficulty of each training image"
            )
        if self.pix_init != "window" and self.score_path is not None:
            raise InputError(
                f"--score_path {self.score_path}: expected --pix_init window with it, found {self.pix_init}"
            )
        if not self.distilled_per_class:
            raise InputError(
                f"--distilled_share {self.distilled_share:g}: expected at least one distilled image of the {self.ipc} of a class, found "
                "none; give a larger share"
            )
        if self.distilled_per_class < self.ipc and self.pix_init == "noise":
            raise InputError(
                f"--distilled_share {self.distilled_share:g}, --pix_init noise: expected real images to keep; leave one of them out"
            )

    def _check_frequencies(self) -> None:
        """Raise `InputError` unless frequencies can be chosen by how real images of a class differ."""
        if self.msz_per_channel is None:
            return
        if self.pix_init == "noise":
            raise InputError(
                f"--msz_per_channel {self.msz_per_channel}, --pix_init noise: expected real images, from which the frequencies are chosen; "
                "leave one of them out"
            )
        if self.distilled_share < 1:
            raise _found_both(
                f"--msz_per_channel {self.msz_per_channel}",
                f"--distilled_share {self.distilled_share:g}",
                "real images keep all their frequencies",
            )
        if self.ipc < 2:
            raise InputError(
                f"--msz_per_channel {self.msz_per_channel}, --ipc {self.ipc}: expected at least two images per class, since the "
                "frequencies are chosen by their differences; raise --ipc"
            )

    def _check_parametrisation(self) -> None:
        """Raise `InputError` for options that need images of free pixels."""
        others = {
            "--msz_per_channel": self.msz_per_channel is not None,
            "--distilled_share": self.distilled_share < 1,
            "--ema_decay": self.ema_decay is not None,
            "--texture": self.texture,
        }
        for other, given in others.items():
            if self.parametrisation is not None and given:
                raise _found_both(f"--parametrisation {self.parametrisation}", other, "it decides on the pixels")

    def _check_texture(self) -> None:
        """Raise `InputError` for options that need images of the networks' input size, which canvases do not have."""
        others = {
            "--zca": self.zca,
            "--teacher_label": self.teacher_label,
            "--label_init experts": self.label_init == "experts",
            "--cam_model": self.cam_model is not None,
            "--pix_init window": self.pix_init == "window",
            "--distilled_share": self.distilled_share < 1,
            "--msz_per_channel": self.msz_per_channel is not None,
        }
        for other, given in others.items():
            if given:
                raise _found_both("--texture", other, "a canvas is larger than an image")


def _found_both(first: str, second: str, reason: str) -> InputError:
    """Return the error for two options that exclude each other for a `reason`; a recipe or an earlier run may have set either."""
    fields, names = fields_of(DistillOptions), [each.split()[0].removeprefix("--") for each in (first, second)]
    off = [f"--no_{name}" if fields[name].is_switch else f"--{name} {fields[name].default}" for name in names]
    return InputError(
        f"{first}, {second}: expected one of them, found both: {reason}; leave one of them out, or turn one off that the recipe or the run "
        f"brings, by {' or '.join(off)}"
    )
