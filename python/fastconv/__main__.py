"""``python -m fastconv`` is the ``fastconv`` command."""

from __future__ import annotations

import sys

from fastconv.cli import main

sys.exit(main())
