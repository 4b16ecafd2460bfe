"""Benchmarks of mtt_fast, run from the checkout: `python -m bench` lists them.

Every timing stands beside the correctness gate that its engine passed, its memory, and its device; `records.py` writes
these as JSON and `render.py` makes tables and plots of the records. Engines run in processes of their own that stay alive and are
timed in turn, so that a noisy machine is noisy for all of them.
"""
