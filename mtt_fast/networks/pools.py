"""The networks that an evaluation trains: the pools that the public code names by a letter."""

from __future__ import annotations

from mtt_fast.errors import InputError
from mtt_fast.user_code import is_user_code

POOLS: dict[str, tuple[str, ...]] = {
    "M": ("ConvNet", "AlexNet", "VGG11", "ResNet18_AP", "ResNet18"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
    "B": ("ConvNetBN", "ConvNetASwishBN", "AlexNetBN", "VGG11BN", "ResNet18BN"),
    "BN": ("ConvNet", "ConvNetBN", "ResNet18", "ResNet18BN", "AlexNet", "VGG11", "ResNet18_AP"),
}
"""Networks by the letter of `get_eval_pool`: M as in MTT (Table 3 of the paper; DATM, PAD and ATT leave ResNet18_AP out), B as in DM, BN as in
DATM.

The pools ablate architecture (M), width (W), depth (D), activation (A), pooling (P), norm (N), batch norm (B, BN).
"""


def eval_pool(eval_mode: str, model: str) -> tuple[str, ...]:
    """Return the names of the networks of the pool `eval_mode`, where the distillation's own network is `model`.

    Besides `POOLS`: S is `model` itself, with instance norm in place of batch norm as in the public code, since a
    small set says little of batch statistics (that code also drops what comes after BN in a name); SS is `model` as it is; C is `model`
    and ConvNet.
    Raises `InputError` for another letter.
    """
    with_instance_norm = model if is_user_code(model) else model.replace("BN", "")
    own = {"S": (with_instance_norm,), "SS": (model,), "C": tuple(dict.fromkeys((model, "ConvNet")))}
    pool = (own | POOLS).get(eval_mode)
    if pool is None:
        raise InputError(f"`eval_mode` {eval_mode}: expected one of {', '.join([*own, *POOLS])}")
    return pool
