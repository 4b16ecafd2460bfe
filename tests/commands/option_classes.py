"""List the class of options of every command."""

from __future__ import annotations

from mtt_fast.analysis.distance import DistanceOptions
from mtt_fast.analysis.evolution import EvolutionOptions
from mtt_fast.analysis.grid import GridOptions
from mtt_fast.analysis.score import ScoreOptions
from mtt_fast.analysis.tables import TablesOptions
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.compress import CompressOptions
from mtt_fast.convert.options import ConvertOptions
from mtt_fast.cross.command import CrossOptions
from mtt_fast.distill.options import DistillOptions
from mtt_fast.evaluate import EvaluateOptions
from mtt_fast.experts.options import ExpertOptions
from mtt_fast.recipes.__main__ import ListOptions
from mtt_fast.report.__main__ import ReportOptions

COMMANDS: dict[str, type] = {
    "distill": DistillOptions, "experts": ExpertOptions, "evaluate": EvaluateOptions, "cross": CrossOptions,
    "compress": CompressOptions, "convert": ConvertOptions, "grid": GridOptions, "distance": DistanceOptions,
    "tables": TablesOptions, "evolution": EvolutionOptions, "score": ScoreOptions, "report": ReportOptions,
    "recipes": ListOptions, **{name: method.options for name, method in METHODS.items()},
}  # fmt: skip
