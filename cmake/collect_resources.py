"""A launcher of nvcc: keeps what ptxas says about kernels (-Xptxas=-v) beside the object, in OBJECT.resources.

collect_resources.py NVCC ARGUMENT...

Everything else that the compiler says goes where it always went. tools/check_gpu_resources.py reads the files.
"""

import re
import subprocess
import sys
from pathlib import Path

_ABOUT_RESOURCES = re.compile(r"ptxas info +:|\s+\d+ bytes stack frame, ")


def main(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    lines = done.stderr.splitlines(keepends=True)
    kept = [line for line in lines if _ABOUT_RESOURCES.match(line)]
    sys.stderr.writelines(line for line in lines if not _ABOUT_RESOURCES.match(line))
    if "-o" in command and done.returncode == 0:
        Path(command[command.index("-o") + 1] + ".resources").write_text("".join(kept))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
