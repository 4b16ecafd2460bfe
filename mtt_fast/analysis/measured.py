"""Read the accuracies in run folders, and group them by setting, for comparison with the numbers of a paper."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mtt_fast.commands.option_fields import Role, names_of
from mtt_fast.commands.options import EvaluationOptions
from mtt_fast.data.catalogue import name_of
from mtt_fast.distill.method_names import marked_method
from mtt_fast.distill.options import DistillOptions
from mtt_fast.errors import InputError
from mtt_fast.recipes import recipe_names, recipe_options
from mtt_fast.storage.run_files import SUMMARY
from mtt_fast.storage.run_summary import read_summary

RANDOM = "Random"
"""The method's name for as many random real images, which every distillation measures as well."""
PAPER_RES = 128
"""Resolution of the paper's ImageNet subsets."""
PAPER_PROTOCOL = "mtt"
"""Protocol of the paper's evaluations."""
_LOCATION_AND_MACHINE_OPTIONS = names_of(DistillOptions, Role.LOCATION, Role.MACHINE) - {"score_path"}
_DEFAULTS = dataclasses.asdict(DistillOptions())
_RANDOM_IMAGE_OPTIONS = names_of(EvaluationOptions, Role.RESULT, Role.EVALUATION) - {"seed", "eval_mode"}
"""Options on which the accuracy of random real images depends, besides the seed."""


class Setting(NamedTuple):
    """The setting of a measurement: two with the same setting can be compared with one number of a paper."""

    dataset: str
    """as --dataset spells it; of ImageNet, the subset"""
    model: str
    """the network that was tested"""
    method: str
    ipc: str


class Measured(NamedTuple):
    """The accuracy in one setting, from runs that differ in nothing but the seed, their own or that of their experts."""

    runs: tuple[str, ...]
    mean: float
    std: float
    """over the networks of the one run; over the runs, if there are several"""
    n: int
    """networks of the one run; runs, if there are several"""
    diverged: int = 0
    """number of these networks that diverged; number of these runs in which networks diverged"""
    choice: str = ""
    """the choice of options, the same for each number of images per class; see `_choice`"""

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        record = self._asdict() | {"runs": list(self.runs)}
        del record["choice"]
        return record


def finished_runs(folders: Iterable[str | os.PathLike[str]]) -> dict[Path, dict[str, Any]]:
    """Return the summaries of the finished runs in `folders`, run folders or folders of runs, by run folder.

    Raises `InputError` for a path that is not a folder or holds no finished run, and for a broken summary.
    """
    summaries: dict[Path, dict[str, Any]] = {}
    for folder in map(Path, folders):
        runs = sorted(path.parent for path in folder.rglob(SUMMARY))
        if not runs:
            raise InputError(
                f"{folder}: expected a run folder, or a folder of runs, found no {SUMMARY} in it or below; check the path"
            )
        for run in runs:
            if (summary := read_summary(run)) is not None:
                summaries[run] = summary
    return summaries


def measurements(summaries: Mapping[Path, Mapping[str, Any]]) -> dict[Setting, list[Measured]]:
    """Return the accuracies of the runs with these summaries by setting, with an entry for each choice of the other options.

    Raises `InputError` for a summary that does not name its data set, network and images per class.
    """
    groups: dict[tuple[Setting, str], dict[tuple[int, str | None], tuple[str, Mapping[str, Any]]]] = {}
    choices: dict[tuple[Setting, str], str] = {}
    for folder, summary in summaries.items():
        options = _with_known_names(summary.get("options", {}))
        try:
            setting = Setting(_dataset(options), options["model"], _method(summary), str(options["ipc"]))
        except KeyError as error:
            raise InputError(f"{folder}: expected {error} among the options in its summary; run it again") from error
        seed = int(options.get("seed", 0))
        # two folders of images may have the same name, and two networks of users' own
        images = {"fingerprint": summary.get("data", {}).get("fingerprint")}
        if outputs := summary.get("network", {}).get("outputs"):
            images["outputs"] = outputs
        digest = summary.get("experts", {}).get("digest")
        random_options = {name: options.get(name) for name in _RANDOM_IMAGE_OPTIONS}
        for trained_on, method, others, repetition in (
            ("distilled", setting.method, _conditions(options, summary), (seed, digest)),
            ("random_real_images", RANDOM + _protocol(options), random_options, (seed, None)),
        ):
            for network, accuracy in _by_network(summary, trained_on).items():
                key = setting._replace(model=network, method=method), json.dumps(images | others, sort_keys=True)
                choices.setdefault(key, _choice(options, images | others))
                # the same options, seed and experts are the same measurement
                groups.setdefault(key, {}).setdefault(repetition, (str(folder), accuracy))
    by_setting: dict[Setting, list[Measured]] = {}
    for key, by_seed in groups.items():
        combined = _combined(list(by_seed.values()))._replace(choice=choices[key])
        by_setting.setdefault(key[0], []).append(combined)
    return by_setting


def _conditions(options: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the accuracy of a distilled set depends on, besides the real images and the seed."""
    conditions = {
        name: value for name, value in options.items() if name not in (*_LOCATION_AND_MACHINE_OPTIONS, "seed")
    }
    experts = summary.get("experts", {})
    known = experts.get("hyperparameters")
    # experts of a curriculum (PAD) are others at the same options, those of other software may be of any training, and of those
    # that a baseline used only the folder is known
    if "imported_from" in (known or ()):
        known = [known, experts.get("digest")]
    conditions["experts"] = known or options.get("buffer_path")
    # two files of scores (SelMatch), or with a class that computes the images, may have had the same name
    return conditions | {name: summary.get(name) for name in ("scores_digest", "code_digest")}


def _choice(options: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Return the `others` without the images per class; of a run by a recipe, only what differs from the recipe.

    The recipes of one name, such as cifar10-ipc1 and cifar10-ipc50, are one choice: a row of the paper has its own settings for each
    number of images, too.
    """
    recipe = options.get("recipe")
    plain, family = {"ipc": options["ipc"]}, None
    if recipe in recipe_names():
        plain, family = _DEFAULTS | recipe_options(recipe), recipe.partition("-ipc")[0]
    own = {name: value for name, value in others.items() if name not in plain or plain[name] != value}
    return json.dumps({"recipe": family} | own, sort_keys=True)


def _with_known_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the data set as `NAMES` spells it, which the commands take in upper or lower case."""
    names = {name: options[name] for name in ("dataset", "subset") if options.get(name)}
    return dict(options) | {name: name_of(value) or value for name, value in names.items()}


def _dataset(options: Mapping[str, Any]) -> str:
    """Return the data set's name, marked where it is an image folder, with the resolution where the paper has another."""
    name = str(options.get("subset") or options["dataset"])
    if "/" in name:
        name = f"{Path(name).name} (folder)"
    return f"{name} at {options['res']} px" if options.get("res") not in (None, PAPER_RES) else name


def _by_network(summary: Mapping[str, Any], images: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the accuracy of each network that was trained on `images`; --eval_mode adds networks to the run's own."""
    if images not in summary["accuracy"]:
        return {}
    tested: Mapping[str, Mapping[str, Mapping[str, Any]]] = summary.get("accuracy_by_network", {})
    first = next(iter(tested.get("distilled", ())), summary["options"]["model"])  # its accuracy stands first
    return tested.get(images) or {first: summary["accuracy"][images]}


def _method(summary: Mapping[str, Any]) -> str:
    """Return the method's name, marked where its number does not compare with the paper's."""
    name = str(summary.get("method", "MTT")) + _protocol(summary["options"])
    return marked_method(name, summary["options"])


def _protocol(options: Mapping[str, Any]) -> str:
    """Return a mark for the numbers of another protocol than the paper's, since such numbers do not compare."""
    name, best = options.get("protocol", PAPER_PROTOCOL), options.get("best_epoch")
    return (f", protocol {name}" if name != PAPER_PROTOCOL else "") + (", best epoch" if best else "")


def _combined(runs: list[tuple[str, Mapping[str, Any]]]) -> Measured:
    folders = tuple(folder for folder, _ in runs)
    if len(runs) == 1:
        accuracy = runs[0][1]
        return Measured(folders, accuracy["mean"], accuracy["std"], accuracy["n"], accuracy.get("diverged", 0))
    means = [accuracy["mean"] for _, accuracy in runs]
    diverged = sum(1 for _, accuracy in runs if accuracy.get("diverged"))
    return Measured(folders, statistics.fmean(means), statistics.stdev(means), len(means), diverged)
