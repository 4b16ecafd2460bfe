"""Write one page of HTML about runs: pictures, curves, accuracies, cost, options, versions."""

from mtt_fast.report.page import render

__all__ = ["render"]
