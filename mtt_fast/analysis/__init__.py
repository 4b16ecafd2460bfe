"""Analyse runs as the paper does, `python -m mtt_fast.analysis COMMAND`: each command writes numbers (JSON) and pictures."""
