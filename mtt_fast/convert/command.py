"""Convert sets and experts to and from the files of other software: `python -m mtt_fast convert SOURCE DESTINATION`.

The kinds of files are in mtt_fast/interop. Experts come as replay_buffer_N.pt of the public code; the destination of
experts is the folder that --buffer_path names, in the public code and here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mtt_fast.commands import parsing
from mtt_fast.commands.option_checks import check_effects
from mtt_fast.convert.experts import EXPERT_KINDS, expert_kinds_of, export_to, import_from, options_in_path
from mtt_fast.convert.options import ConvertOptions, parse_options
from mtt_fast.convert.sets import convert_set
from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.interop import SET_KINDS, set_kinds_of
from mtt_fast.interop.sets import content_of

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parse_options(argv)
    source, kinds = Path(options.source), EXPERT_KINDS | SET_KINDS
    found = [options.from_] if options.from_ else [*expert_kinds_of(source), *set_kinds_of(source)]
    if not found:
        raise InputError(
            f"{source}: expected files of a known kind, found {content_of(source)}; check the path, or give --from KIND"
        )
    kind, *others = found
    for option, name in (("--from", kind), ("--to", options.to)):
        if name is not None and name not in kinds:
            raise InputError(f"{option} {name}: expected one of {', '.join(kinds)}{did_you_mean(name, list(kinds))}")
    log.info("%s: %s", source, kinds[kind])
    for other in others:
        content = "experts" if other in EXPERT_KINDS else "sets"
        log.warning("%s: other %s (%s) are not read; --from %s reads them", source, content, kinds[other], other)
    given = parsing.given(ConvertOptions, argv)
    if kind in EXPERT_KINDS:
        if kind != "experts":
            in_path = options_in_path(source)
            options = parse_options(argv, in_path)
            for name, value in in_path.items():
                if getattr(options, name) != value:
                    log.warning(
                        "--%s %s: the folder's name says %s; is it another?", name, getattr(options, name), value
                    )
        for remark in check_effects(options, given, options.without_effect_on_experts(exported=kind == "experts")):
            log.info("%s", remark)
        export_to(options) if kind == "experts" else import_from(options, kind)
    else:
        convert_set(options, kind, given)
