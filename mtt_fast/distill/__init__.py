"""The parts of `python -m mtt_fast.distill`: options, the state and what it starts from, segments, updates, evaluation."""
