"""One page of HTML that tells what runs did: pictures, curves, accuracies, cost, options, versions."""

from mtt_fast.report.page import render

__all__ = ["render"]
