"""The subcommands of the ``fastconv`` command: one module each with ``add_arguments(parser)`` and ``run(args)``.

The modules named after subcommands import neither torch nor the demo extra at their top, so that ``fastconv --help``
answers at once and everywhere.
"""

from __future__ import annotations

import importlib.util


class CommandError(Exception):
    """One sentence for the person at the terminal: why the command could not run and what would let it."""


def require(*modules: str) -> None:
    """CommandError naming the extra to install if any of the ``demo`` extra's ``modules`` is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"this needs {', '.join(missing)}; get what is missing with: pip install 'fastconv[demo]'")
