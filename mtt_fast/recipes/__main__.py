"""List the recipes: `python -m mtt_fast.recipes`."""

import sys
from collections.abc import Sequence

from mtt_fast import cli
from mtt_fast.errors import InputError
from mtt_fast.recipes import recipe_about, recipe_names


def main(argv: Sequence[str]) -> None:
    """Print each recipe with its description and its source."""
    if argv and argv[0] not in ("-h", "--help"):
        raise InputError(
            f"{argv[0]}: python -m mtt_fast.recipes takes no options; python -m mtt_fast.distill --recipe NAME runs one"
        )
    if argv:
        print("usage: python -m mtt_fast.recipes\n\nSettings by name, for python -m mtt_fast.distill --recipe NAME:\n")
    for name in recipe_names():
        about = recipe_about(name)
        print(f"{name:24} {about['description']}\n{'':24} {about['source']}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
