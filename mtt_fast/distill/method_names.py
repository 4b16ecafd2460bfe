"""Mark the name of a run's method if its accuracy cannot be compared with the papers' tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtt_fast.distill.options import DistillOptions

_OF_SUCCESSORS = (
    "rho_max", "gradient", "match_step", "loss_ratio", "depth_ratio", "cam_model", "lr_y", "teacher_label", "threshold",
    "min_start_epoch", "current_max_start_epoch", "continuous_start", "noise_start", "num_interpolation", "num_trajectories",
    "lr_per_step", "student_mom", "student_l2", "distilled_share", "pix_init", "lr_decay",
)  # fmt: skip
"""The options of MTT's successors that make another method of it, except at their defaults."""
_OF_MTT = {"pix_init": "noise"}
"""The values of these options, besides the defaults, that MTT itself has."""


def marked_method(name: str, options: Mapping[str, Any]) -> str:
    """Return the `name` of a method, marked if its accuracy cannot be compared with the papers' tables.

    This holds for textures, frequencies (FreD) and parametrised images (SPEED, DDiF), where --ipc does not measure storage as in
    the papers, for selected real images with the experts' labels, and for MTT with changes of its successors.
    """
    if name.partition(",")[0] == "MTT" and (changes := _changes_of_successors(options)):
        name = f"{name}, with {' '.join(changes)}"
    if options.get("texture"):
        return f"{name}, textures"
    if options.get("labels") == "experts":
        return f"{name}, labels of experts"
    if parametrisation := options.get("parametrisation"):
        return f"{name}, images by {parametrisation}"
    frequencies = options.get("msz_per_channel")
    return name if frequencies is None else f"{name}, {frequencies} frequencies"


def _changes_of_successors(options: Mapping[str, Any]) -> list[str]:
    """Return the flags of a distillation that MTT itself does not have."""
    defaults = {name: getattr(DistillOptions, name) for name in _OF_SUCCESSORS}
    return [
        f"--{name}" if options[name] is True else f"--{name} {options[name]}"
        for name, default in defaults.items()
        if options.get(name, default) not in (default, _OF_MTT.get(name))
    ]
