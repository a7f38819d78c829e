"""The ``fastconv`` command: ``info``, ``check`` and ``bench``. Each subcommand's code is a module of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fastconv
from fastconv.commands import CommandError, check, info

EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv[1:]`` when left out) and return the exit status.

    0: all well. 1: the command ran and found a fault, such as backends that disagree. 2: it could not run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        # bench has a parser of its own; handing it the words untouched keeps --help and errors its own too.
        from fastconv.bench import main as bench

        return int(bench(argv[1:]) or 0)
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except CommandError as error:
        print(f"fastconv {args.command}: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastconv",
        description="Convolution, pooling, dense, attention and norm layers for PyTorch on fastconv's own kernels.",
    )
    parser.add_argument("--version", action="version", version=f"fastconv {fastconv.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in (("info", info), ("check", check)):
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    commands.add_parser("bench", help="Time ops, layers or whole models against torch (fastconv bench --help).")
    return parser


if __name__ == "__main__":
    sys.exit(main())
