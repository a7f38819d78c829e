"""``python -m fastconv.bench``: the same as ``fastconv bench``."""

import sys

from fastconv.bench import main

sys.exit(main())
