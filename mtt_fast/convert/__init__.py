"""Convert distilled sets and experts to and from the files of other software: `python -m mtt_fast convert`."""
