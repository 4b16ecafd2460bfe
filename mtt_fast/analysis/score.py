"""Compute DD-Ranking's label-robust score from fractions: `python -m mtt_fast.analysis score`.

    HLR = accuracy on all real images − accuracy on the distilled set, both with hard labels
    IOR = accuracy on the distilled set − accuracy on as many random real images, both with the labels of the method
    α   = w·IOR − (1 − w)·HLR,     score = (e^α − e⁻¹) / (e − e⁻¹)

The definition is that of DD-Ranking (arXiv 2505.13300), whose version 0.2.0 puts per cent into the exponent. Accuracies are
given in per cent, or as the files that `mtt_fast.evaluate … --protocol ddranking --out FILE` writes of a set, of the same
set converted with --hard_labels, and of the word "random".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from mtt_fast.commands import parsing
from mtt_fast.commands.evaluated_set import RANDOM
from mtt_fast.commands.option_fields import Checked
from mtt_fast.errors import InputError
from mtt_fast.interop import label_robust_score
from mtt_fast.networks.users_network import is_same_function
from mtt_fast.storage.outputs import check_output_file
from mtt_fast.storage.records import verified
from mtt_fast.storage.regular import read_text
from mtt_fast.storage.text_files import parse_json, write_json

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast.analysis score"
_BOARD = "ddranking"
"""The protocol of DD-Ranking's board."""
_TRAINING_FIELDS = ("epochs", "batch_size", "augment")
"""The settings of a protocol that have options, besides the learning rate, in which sets may differ."""


@dataclass(frozen=True)
class ScoreOptions:
    """Compute DD-Ranking's label-robust score from accuracies. Give each as a number in per cent or as a file that mtt_fast.evaluate wrote."""

    full: str | None = None
    """accuracy on all real images, with hard labels"""
    hard: str | None = None
    """accuracy on the distilled set with hard labels; if not given, --distilled (for a set with hard labels)"""
    distilled: str | None = None
    """accuracy on the distilled set with its own labels"""
    random: str | None = None
    """accuracy on as many random real images, with the same kind of labels as the distilled set"""
    hlr: float | None = None
    """hard label recovery in per cent, instead of --full and --hard"""
    ior: float | None = None
    """improvement over random in per cent, instead of --random (and of --distilled, if --hlr is given)"""
    weight: float = 0.5
    """w: weight of the improvement over random in the score, in [0, 1]"""
    out: Annotated[str | None, Checked(check_output_file)] = None
    """write the score to this JSON file too"""


class _Accuracy(NamedTuple):
    """A mean accuracy in [0, 1], with its data set, network, number of images and protocol, where a file names them."""

    mean: float
    setting: dict[str, str]
    network: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """the description of its network (`Trainable.describe`), where a file has it"""


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.parse(ScoreOptions, argv, PROGRAM)
    given = {name: getattr(options, name) for name in ("full", "hard", "distilled", "random")}
    accuracies = {name: _accuracy(f"--{name}", text) for name, text in given.items() if text is not None}
    setting = _common_setting(accuracies)
    recovery = ("full", "hard" if options.hard is not None else "distilled")
    improvement = ("distilled", "random")
    used = [*(recovery if options.hlr is None else ()), *(improvement if options.ior is None else ())]
    for name in accuracies:
        if name not in used:
            raise InputError(
                f"--{name}: has no effect with --hlr or --ior, which give the difference already; leave it out"
            )
    hlr = _difference(options.hlr, "--hlr", accuracies, *recovery)
    ior = _difference(options.ior, "--ior", accuracies, *improvement)
    if not 0 <= options.weight <= 1:
        raise InputError(f"--weight {options.weight}: expected 0 to 1")
    score = label_robust_score(hlr, ior, options.weight)
    if setting.get("protocol", _BOARD) != _BOARD:
        log.info("measured under protocol %s: DD-Ranking's board has the best epoch", setting["protocol"])
    log.info(
        "HLR %.2f %%, IOR %.2f %%, label-robust score %.3f (weight %g)", 100 * hlr, 100 * ior, score, options.weight
    )
    if options.out:
        record: dict[str, Any] = {
            "label_robust_score": score,
            "hard_label_recovery": hlr,
            "improvement_over_random": ior,
            "weight": options.weight,
            "accuracy": {name: accuracy.mean for name, accuracy in accuracies.items()},
        }
        write_json(options.out, record | setting)


def _accuracy(option: str, text: str) -> _Accuracy:
    """Return the accuracy in `text`, a number in per cent or the path of a file that holds one."""
    try:
        per_cent = float(text)
    except ValueError:
        return _read_accuracy(option, Path(text))
    if not 0 <= per_cent <= 100:
        raise InputError(f"{option} {text}: expected an accuracy in per cent, 0 to 100")
    if option == "--full" and per_cent <= 1:
        raise InputError(
            f"{option} {text}: expected an accuracy in per cent, such as 84.8, found what looks like a fraction"
        )
    if 0 < per_cent <= 1:
        log.warning("%s %s: taken as %s %%; is it a fraction, %g %%?", option, text, text, 100 * per_cent)
    return _Accuracy(per_cent / 100, {})


def _read_accuracy(option: str, path: Path) -> _Accuracy:
    try:
        record = verified(parse_json(read_text(path)))
        mean = float(record["accuracy"]["mean"])
        setting = {name: str(record[name]) for name in ("dataset", "model")}
        protocol, data = record["protocol"], record.get("data", {})
        setting["protocol"] = str(protocol["name"])
        training_fields = () if option == "--full" else _TRAINING_FIELDS
        setting |= {name: str(protocol[name]) for name in ("best_epoch", *training_fields) if name in protocol}
        setting |= {"images": str(record["images"])} if training_fields and "images" in record else {}
        setting |= {"fingerprint": str(data["fingerprint"])} if "fingerprint" in data else {}
    except InputError as error:
        raise InputError(f"{option}: expected a number in per cent or a file; {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{option} {path}: expected what mtt_fast.evaluate writes with --out FILE.json, found "
            + (f"no field {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}")
        ) from error
    if not 0 <= mean <= 1:
        raise InputError(f"{option} {path}: expected an accuracy from 0 to 1, found {mean}")
    if diverged := record["accuracy"].get("diverged"):
        log.warning("%s %s: %d networks diverged, and their accuracy counts as 0", option, path, diverged)
    if option in ("--distilled", "--hard") and record.get("source") == RANDOM:
        raise InputError(f"{option} {path}: expected the accuracy on a distilled set, found that on random real images")
    if option == "--random" and record.get("made_from") is not None:
        log.warning(
            "%s %s: was measured on the distilled set %s; is it one of random real images?",
            option,
            path,
            record["source"],
        )
    return _Accuracy(mean, setting, record.get("network", {}))


def _common_setting(accuracies: dict[str, _Accuracy]) -> dict[str, str]:
    """Return the setting that the files name. Raises `InputError` where files differ: such numbers do not compare."""
    common: dict[str, str] = {}
    first = next((accuracy.network for accuracy in accuracies.values() if accuracy.network), {})
    for name, accuracy in accuracies.items():
        for field, value in accuracy.setting.items():
            if common.setdefault(field, value) != value:
                raise InputError(
                    f"--{name}: expected the {field} {common[field]} as in the files before it, found {value}"
                )
        if not is_same_function(first, accuracy.network):
            raise InputError(
                f"--{name}: expected the {common['model']} of the files before it, found another version of its code; evaluate again"
            )
    return common


def _difference(
    given: float | None, option: str, accuracies: dict[str, _Accuracy], greater: str, smaller: str
) -> float:
    """Return as a fraction the difference that `option` gives in per cent, or else the `greater` accuracy less the `smaller`."""
    if given is not None:
        if not -100 <= given <= 100:
            raise InputError(f"{option} {given}: expected per cent, -100 to 100")
        return given / 100
    missing = [name for name in (greater, smaller) if name not in accuracies]
    if missing:
        raise InputError(f"--{missing[0]}: expected an accuracy, found none; or give {option}")
    return accuracies[greater].mean - accuracies[smaller].mean
