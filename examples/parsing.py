"""What the command lines of the scripts have in common."""

import argparse


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser that shows the first line of a docstring, and defaults."""
    return argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def at_least_one(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str
) -> None:
    """Exits with 2 if one of these options is less than 1."""
    for name in names:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
