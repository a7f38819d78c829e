"""What cmake/cuda_architectures.cmake makes of FASTCONV_CUDA_ARCHITECTURES, by CMake's script mode: no toolkit is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Beside the interpreter where an environment was not activated.
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
KNOWN = "sm_75;sm_80;sm_86;sm_89;sm_90;sm_100;sm_120"

pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")


def run(given: str, tmp_path: Path) -> tuple[int, str]:
    script = tmp_path / "script.cmake"
    script.write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        f'include("{ROOT}/cmake/cuda_architectures.cmake")\n'
        f'fastconv_cuda_architectures("{given}" "{KNOWN}")\n'
        'message("${FASTCONV_CUDA_BUILT_FOR} | ${FASTCONV_CUDA_LEAST} | ${FASTCONV_CUDA_CODE}")\n'
    )
    assert CMAKE is not None
    done = subprocess.run([CMAKE, "-P", script], capture_output=True, text=True)
    return done.returncode, " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("given", "all_of_them"),
    [
        ("80;90", "80 90"),
        ("90;80", "80 90"),
        ("80;86;89;90a", "80 86 89 90"),
        ("120a;80", "80 120"),
        ("100f; 90;90", "90 100"),
        ("86", "86"),
    ],
)
def test_ptx_of_the_least_and_machine_code_of_each(given: str, all_of_them: str, tmp_path: Path) -> None:
    least = all_of_them.split()[0]
    code = ",".join(f"sm_{one}" for one in all_of_them.split())
    options = f"--gpu-architecture=compute_{least};--gpu-code=compute_{least},{code}"
    assert run(given, tmp_path) == (0, f"{all_of_them} | {least} | {options}")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "FASTCONV_CUDA_ARCHITECTURES is empty, expected compute capabilities: 80;90"),
        ("80,90", "got '80,90', expected compute capabilities with ';' between them: 80;90"),
        ("native", "got 'native', expected compute capabilities"),
        ("sm_80", "got 'sm_80', expected compute capabilities"),
        ("8.0", "got '8.0', expected compute capabilities"),
        ("80;75", "got 75, expected 80 or later"),
        ("80;123", "got 123, and this nvcc has sm_75 sm_80 sm_86"),
    ],
)
def test_what_nvcc_cannot_do_ends_the_configuration(given: str, says: str, tmp_path: Path) -> None:
    status, words = run(given, tmp_path)
    assert status != 0
    assert says in words
