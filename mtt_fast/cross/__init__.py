"""Test distilled sets on networks other than their own: `python -m mtt_fast.cross`."""
