"""Benchmarks of mtt_fast, run from the checkout: `python -m bench` lists them.

Every timing stands beside a correctness gate that it passed, its memory, and what it ran on; `records.py` writes these
as JSON and `render.py` makes tables and plots of them. Engines run in processes of their own that stay alive and are
timed in turn, so that a noisy machine is noisy for all of them.
"""
