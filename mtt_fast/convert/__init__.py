"""The parts of `python -m mtt_fast convert`: options, distilled sets, experts."""
