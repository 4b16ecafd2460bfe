"""The options of a conversion."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from mtt_fast.commands import parsing
from mtt_fast.commands.option_fields import HARMLESS, Checked, Group, Role
from mtt_fast.commands.options import CommonOptions, Count, Positive, PositiveShare, Side, StoreDtype
from mtt_fast.errors import InputError
from mtt_fast.runtime.provenance import check_device_name

PROGRAM = "python -m mtt_fast convert"
PICTURES = ("png", "parquet")
"""Kinds of sets whose images are pictures with a record."""
WITH_DATA = ("synthetic", *PICTURES, "ncfm")
"""Kinds of sets that need the properties of the real images."""


def _check_method(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"--method {name}: expected a name of letters and digits, as names of files hold it")


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a distilled set, or experts' trajectories, to or from the files of other software."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")] = ""
    """file or folder to convert"""
    destination: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DESTINATION")] = ""
    """file or folder to write. For a set: a new one; for experts: the --buffer_path of the command that will read them, which may exist"""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """kind of the source, if its file names do not show it: those of --to, or convexified (MCT)"""
    to: str | None = None
    """kind of the destination. Sets: synthetic, mtt, dc, ncfm, dc_benchmark, ddranking, png, parquet; experts: experts, buffer, waypoints. If not
    given: the kind that the destination's name shows; else the public code's kind for a source of mtt_fast, and mtt_fast's kind
    for any other source. --to experts can also rewrite experts of mtt_fast"""

    dataset: Annotated[str | None, HARMLESS, Group.DATA] = None
    """data set of the real images; files of other software do not name it"""
    subset: Annotated[str | None, HARMLESS, Group.DATA] = None
    """subset of ImageNet"""
    res: Annotated[Side | None, HARMLESS, Group.DATA] = None
    """resize the images to this side length in pixels (only data sets without a fixed size)"""
    data_path: Annotated[str, Role.LOCATION, HARMLESS, Group.DATA] = "data"
    """folder of the data sets"""
    packed_path: Annotated[str | None, Role.LOCATION, HARMLESS, Group.DATA] = None
    """folder for packed data sets, for example if DATA_PATH is read-only; if not given, DATA_PATH/packed"""
    download: Annotated[bool, Role.LOCATION, HARMLESS, Group.DATA] = False
    """download the data set if it is missing"""
    zca: Annotated[bool, HARMLESS, Group.DATA] = False
    """declare that the source was made with ZCA-whitened images"""
    model: Annotated[str, HARMLESS, Group.NETWORK] = "ConvNet"
    """network of the experts"""
    device: Annotated[str, Role.MACHINE, HARMLESS, Group.MACHINE, Checked(check_device_name)] = "auto"
    """device that tests imported experts: auto, cpu, cuda, cuda:1, …"""

    lr_teacher: Annotated[Positive, Group.SET] = 0.01
    """learning rate of the set, if its files have none"""
    distilled_share: Annotated[PositiveShare, Group.SET] = 1.0
    """share of each class's images that was distilled, the first ones, if the others are real (SelMatch's alpha)"""
    factor: Annotated[Count | None, Group.SET] = None
    """record that each image consists of FACTOR × FACTOR smaller ones, which networks see scaled up; if not given, 2 for files of NCFM, else 1"""
    label_kind: Annotated[Literal["probabilities", "weights", "logits"] | None, Group.LABELS] = None
    """kind of the source's soft labels; if not given, guessed from their sums"""
    reorder: Annotated[bool, Group.LABELS] = False
    """sort a set with soft labels by the class of the largest label"""
    hard_labels: Annotated[bool, Group.LABELS] = False
    """write each image's class instead of its soft label"""
    method: Annotated[str | None, Checked(_check_method), Group.SET] = None
    """method that made the set, for file names of dc_benchmark and DC: TM, DC, DSA, DM, random, Kmeans; if not given, the method in the
    set's record, or TM"""

    measure: Annotated[Literal["last", "all"], Group.EXPERTS] = "last"
    """measure the test accuracy of each imported expert after its last epoch, or after all epochs; unmeasured epochs have NaN"""
    store_dtype: Annotated[StoreDtype, Group.EXPERTS] = "float32"
    """number format of imported experts; bfloat16 takes half the disk space"""
    experts_per_file: Annotated[Count, Group.EXPERTS] = 10
    """experts per replay_buffer_N.pt (the public code's --save_interval); all experts of a file are in memory together"""

    def common(self) -> CommonOptions:
        """Return the options that name the real images and the network. Raises `InputError` without a data set."""
        if self.dataset is None:
            raise InputError(
                f"{self.source}: expected the real images that it belongs to, which its files do not name; give --dataset "
                "(and --data_path, --zca, --model where needed)"
            )
        names = {field.name for field in dataclasses.fields(CommonOptions)} & set(vars(self))
        return CommonOptions(**{name: getattr(self, name) for name in names})

    def without_effect_on_experts(self, *, exported: bool) -> dict[str, str]:
        """Return the options that have no effect where experts are `exported`, or else imported, with the reasons."""
        set_options = ("lr_teacher", "distilled_share", "factor", "label_kind", "reorder", "hard_labels", "method")
        reasons = dict.fromkeys(set_options, "on experts, only on distilled sets")
        if exported:
            known = "on experts of mtt_fast, whose files contain it"
            reasons |= dict.fromkeys((*_DATA_OPTIONS, "dataset", "zca", "model"), known)
            reasons |= dict.fromkeys(_IMPORT_OPTIONS, "on experts that are exported, only on imported ones")
        else:
            reasons["experts_per_file"] = "on imported experts, each of which gets its own file"
            reasons |= self._without_effect_on_data()
        return reasons

    def without_effect_on_set(self, kind: str, to: str) -> dict[str, str]:
        """Return the options that have no effect where a distilled set of `kind` becomes one of kind `to`, with the reasons."""
        reasons = dict.fromkeys((*_IMPORT_OPTIONS, "experts_per_file"), "on a distilled set, only on experts")
        if kind == "synthetic":
            known = "on a set of mtt_fast, whose file contains it"
            reasons |= dict.fromkeys(
                (*_DATA_OPTIONS, "model", "lr_teacher", "distilled_share", "factor", "label_kind"), known
            )
        elif to not in WITH_DATA:
            # pictures are normalised, and get a learning rate, for every kind
            read = {"ncfm": _DATA_OPTIONS} | dict.fromkeys(PICTURES, (*_DATA_OPTIONS, "lr_teacher"))
            unread = {*_DATA_OPTIONS, "model", "lr_teacher", "distilled_share", "factor"}.difference(read.get(kind, ()))
            reasons |= dict.fromkeys(unread, f"without --to {' or '.join(WITH_DATA)}")
        else:
            reasons |= self._without_effect_on_data()
        if kind in ("dc_benchmark", "png"):
            reasons["label_kind"] = f"on a set of kind {kind}, whose labels need no guess"
        if to not in ("dc", "dc_benchmark"):
            reasons["method"] = "without --to dc or dc_benchmark, whose file names contain it"
        return reasons

    def _without_effect_on_data(self) -> dict[str, str]:
        """Return the options of the real images that have no effect on the data set, with the reasons."""
        reasons = {} if self.dataset is None else dataclasses.replace(self.common(), device="cpu").without_effect()
        return {name: reason for name, reason in reasons.items() if name in _DATA_OPTIONS}


_DATA_OPTIONS = ("subset", "res", "data_path", "packed_path", "download")
_IMPORT_OPTIONS = ("measure", "store_dtype", "device")


def parse_options(argv: Sequence[str], defaults: dict[str, Any] | None = None) -> ConvertOptions:
    """Return the options of a command line, where `defaults` replace the class's own. Raises `InputError` for bad values.

    Which options have an effect depends on the kind of the source: the caller that knows it calls `check_effects`.
    """
    options = parsing.preview(ConvertOptions, argv, PROGRAM, defaults)
    if not options.source or not options.destination:
        raise InputError(f"expected a source and a destination; see {PROGRAM} --help")
    return options
