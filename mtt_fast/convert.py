"""Distilled sets and experts to and from the files of other software: `python -m mtt_fast convert SOURCE DESTINATION`.

The kinds of files are in mtt_fast/interop. Experts come as replay_buffer_N.pt of the public code; a destination of
experts is what --buffer_path names, in the public code and here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mtt_fast import cli
from mtt_fast.conversion.experts import EXPERT_KINDS, expert_kind_of, export_to, import_from, options_in_path
from mtt_fast.conversion.options import ConvertOptions, parse_options
from mtt_fast.conversion.sets import convert_set
from mtt_fast.errors import InputError
from mtt_fast.interop import SET_KINDS, set_kind_of
from mtt_fast.option_fields import check_effects

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parse_options(argv)
    source, kinds = Path(options.source), EXPERT_KINDS | SET_KINDS
    kind = options.from_ or expert_kind_of(source) or set_kind_of(source)
    if kind is None:
        what = "other files" if os.path.lexists(source) else "nothing there"
        raise InputError(f"{source}: expected files of a known kind, found {what}; check the path, or say --from KIND")
    for option, name in (("--from", kind), ("--to", options.to)):
        if name is not None and name not in kinds:
            raise InputError(
                f"{option} {name}: expected one of {', '.join(kinds)}{cli.did_you_mean(name, list(kinds))}"
            )
    log.info("%s: %s", source, kinds[kind])
    given = cli.given(ConvertOptions, argv)
    if kind in EXPERT_KINDS:
        if kind != "experts":
            told = options_in_path(source)
            options = parse_options(argv, told)
            for name, value in told.items():
                if getattr(options, name) != value:
                    log.warning(
                        "--%s %s: its folder's name tells %s; is it another?", name, getattr(options, name), value
                    )
        for words in check_effects(options, given, options.without_effect_on_experts(kind == "experts")):
            log.info("%s", words)
        export_to(options) if kind == "experts" else import_from(options, kind)
    else:
        convert_set(options, kind, given)


if __name__ == "__main__":
    sys.exit(cli.run(main))
