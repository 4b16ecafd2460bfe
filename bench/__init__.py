"""Benchmark mtt_fast from the checkout: `python -m bench` lists the benchmarks.

Every timing is recorded with the correctness gate that its engine passed, its memory, and its device; `records.py` writes
the records as JSON, `tables.py` and `plots.py` show them. Engines run in processes of their own that stay alive
and are timed in turn, so that a noisy machine is noisy for all of them.
"""
