"""Fill the template page.html.j2 with the content of runs."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from mtt_fast.commands.pictures import evenly, read_snapshot
from mtt_fast.commands.tables import percent
from mtt_fast.report.charts import charts
from mtt_fast.report.runs import RecordedRun

_SHOWN = 5  # snapshots of a run, the first and the last among them

_MEASURED = {
    "distilled": "the set",
    "ema": "average over the iterations",
    "random_real_images": "random real images",
    "random_real_images_labelled_by_experts": "random real images, labels of the experts",
    "experts": "experts, all the data",
    "experts_on_their_own_data": "experts, their own data",
    "own_training": "after the method's own steps",
    "best_evaluation_chosen_on_the_test_images": "best evaluation, chosen on the test images",
    "best_ema_evaluation_chosen_on_the_test_images": "best evaluation of the average, chosen on the test images",
}


@dataclasses.dataclass(frozen=True)
class _Picture:
    caption: str
    data: str  # PNG, base64


def render(runs: Sequence[RecordedRun]) -> str:
    """Return the page about `runs` as HTML that refers to no other file."""
    from jinja2 import Environment  # only this command needs it

    template = (resources.files("mtt_fast.report") / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters = (seconds, mebibytes, number)
    environment.filters |= {each.__name__: each for each in filters} | {"percent": partial(percent, digits=2)}
    measured = list(dict.fromkeys(kind for run in runs for kind in run.accuracies))
    return environment.from_string(template).render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        measured={kind: _MEASURED.get(kind, kind.replace("_", " ")) for kind in measured},
        networks=list(dict.fromkeys(network for run in runs for network in run.by_network)),
        charts=charts(runs),
        pictures={run.name: pictures(run.snapshots) for run in runs},
        chosen=chosen_options,
    )


def pictures(snapshots: Mapping[int, Path]) -> list[_Picture]:
    """Return the first snapshot, the last, and some between, evenly. Raises `InputError` for one that is no picture."""
    return [
        _Picture(f"iteration {iteration:,}", base64.b64encode(read_snapshot(path)[0]).decode("ascii"))
        for iteration, path in evenly(sorted(snapshots.items()), _SHOWN)
    ]


def chosen_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a value, by name."""
    return {name: value for name, value in sorted(options.items()) if value is not None}


def seconds(value: float) -> str:
    """Return a duration as "3 h 05 min", "4 min 20 s" or "12.3 s"."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def mebibytes(value: float) -> str:
    """Return bytes as "1,234 MiB"."""
    return f"{value / 2**20:,.0f} MiB"


def number(value: float | Sequence[float]) -> str:
    """Return a number, or each of several, with five digits."""
    return f"{value:.5g}" if isinstance(value, (int, float)) else ", ".join(f"{item:.5g}" for item in value)
