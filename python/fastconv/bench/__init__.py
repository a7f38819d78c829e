"""``fastconv bench``: how fast, against whom, how sure, and is it right. See docs/measuring.md."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fastconv bench`` with ``argv``, ``sys.argv[1:]`` when left out; returns the exit status."""
    from fastconv.bench.command import main as command

    return command(argv)


__all__ = ["main"]
