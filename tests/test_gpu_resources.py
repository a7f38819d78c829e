"""tools/check_gpu_resources.py and what feeds it, cmake/collect_resources.py, on the words of ptxas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAYS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tilePf' for 'sm_80'
ptxas info    : Function properties for _Z4tilePf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1000 bytes cmem[0]
"""


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_ptxas_says_is_kept_beside_the_object_and_the_rest_passed_on(tmp_path: Path) -> None:
    says = "a warning\n" + SAYS.format(stack=0, stores=0, loads=0)
    compiler = tmp_path / "compiler.py"
    compiler.write_text(f"import sys; sys.stderr.write({says!r}); sys.exit('fail' in sys.argv)")
    made = tmp_path / "tile.cu.o"
    done = run("cmake/collect_resources.py", sys.executable, compiler, "-c", "-o", made)
    assert (done.returncode, done.stderr) == (0, "a warning\n")
    assert Path(f"{made}.resources").read_text() == says.removeprefix("a warning\n")
    assert run("cmake/collect_resources.py", sys.executable, compiler, "fail", "-o", made).returncode == 1


def test_a_kernel_that_spills_fails(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    kept = tmp_path / "deep" / "tile.cu.o.resources"
    kept.write_text(SAYS.format(stack=0, stores=0, loads=0))
    done = run("tools/check_gpu_resources.py", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "255 registers  sm_80  tile(float*)" in done.stdout or "_Z4tilePf" in done.stdout
    kept.write_text(SAYS.format(stack=16, stores=12, loads=8))
    done = run("tools/check_gpu_resources.py", tmp_path)
    assert done.returncode == 1
    assert "spills 20 bytes  sm_80" in done.stdout


def test_silence_is_an_error_and_a_build_without_kernels_is_none(tmp_path: Path) -> None:
    assert run("tools/check_gpu_resources.py", tmp_path).returncode == 0
    (tmp_path / "tile.cu.o.resources").write_text("")
    assert run("tools/check_gpu_resources.py", tmp_path).returncode == 1
