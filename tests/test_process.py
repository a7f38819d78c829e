"""Forks, threads and parallel regions of others: a call must never hang and never give other bits.

What could hang runs in a process of its own, under a time limit.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import fastconv.functional as FF

# Large enough that two threads share it.
PRELUDE = """
import os, sys
import numpy, torch
torch.set_num_threads(2)
torch.manual_seed(0)
x, w = torch.randn(2, 16, 48, 48), torch.randn(32, 16, 3, 3)

def conv():
    import fastconv.functional as FF
    return FF.conv2d(x, w, padding=1)

def fork_and_compare(expected):
    child = os.fork()
    if child == 0:
        # numpy compares: a torch op on several threads would hang here by itself.
        os._exit(0 if numpy.array_equal(conv().numpy(), expected) else 3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run_script(body: str) -> None:
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(body)
    # A session of its own, so that children that hang can be ended with it.
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        pytest.fail(f"hung\n{errors}")
    assert process.returncode == 0, errors


def test_fork_after_our_own_threads_ran() -> None:
    run_script(
        """
        expected = conv().numpy()
        assert fork_and_compare(expected) == 0
        # The parent's pool must have survived, too.
        assert numpy.array_equal(conv().numpy(), expected)
        """
    )


def test_fork_after_only_torch_ran_threads() -> None:
    # libgomp's pool exists in the parent and fastconv has not used it yet: only the fork itself can tell the child.
    run_script(
        """
        import fastconv.functional
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)
        (torch.randn(1 << 20) + 1).sum()
        expected = torch.nn.functional.conv2d(x, w, padding=1).numpy()
        child = os.fork()
        if child == 0:
            os._exit(0 if numpy.allclose(conv().numpy(), expected, atol=1e-4) else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


def test_fork_of_a_fork() -> None:
    run_script(
        """
        expected = conv().numpy()
        child = os.fork()
        if child == 0:
            os._exit(fork_and_compare(expected))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


def test_data_loader_workers() -> None:
    run_script(
        """
        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                torch.set_num_threads(2)  # the loader sets 1, which would hide a hang
                return conv()[0, index]

        expected = conv()
        loader = torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork", timeout=60)
        for index, row in enumerate(loader):
            assert torch.equal(row[0], expected[0, index])
        """
    )


def test_python_threads_at_once() -> None:
    torch.manual_seed(0)
    problems = [
        (torch.randn(2, 8, 20 + 4 * i, 20), torch.randn(16, 8, 3, 3), torch.randn(2, 8, 30, 30 + i)) for i in range(4)
    ]

    def both(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, w, pooled = problems[i % len(problems)]
        return FF.conv2d(x, w, padding=1), FF.max_pool2d(pooled, 3, 2)

    expected = [both(i) for i in range(len(problems))]
    barrier = threading.Barrier(4)
    wrong: list[str] = []

    def work(worker: int) -> None:
        try:
            barrier.wait(timeout=60)
            for i in range(worker, worker + 60):
                got = both(i)
                if not all(map(torch.equal, got, expected[i % len(problems)])):
                    wrong.append(f"worker {worker}, call {i}: other bits")
        except Exception as error:
            wrong.append(f"worker {worker}: {error!r}")

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert not any(worker.is_alive() for worker in workers), "a thread hangs"
    assert wrong == []


def test_backward_on_python_threads_at_once() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 8, 24, 24), torch.randn(16, 8, 3, 3)

    def gradients() -> tuple[torch.Tensor, ...]:
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        return torch.autograd.grad(FF.conv2d(*leaves, padding=1).square().sum(), leaves)

    expected = gradients()
    results: list[tuple[torch.Tensor, ...]] = []
    workers = [threading.Thread(target=lambda: results.append(gradients()), daemon=True) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert len(results) == len(workers), "a thread hangs or failed"
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to open an OpenMP region of its own")
def test_inside_another_parallel_region(tmp_path: Path) -> None:
    source = """
    #include <omp.h>
    extern "C" int in_parallel(void (*body)(int)) {
      int size = 0;
    #pragma omp parallel num_threads(2)
      {
    #pragma omp atomic
        ++size;
        body(omp_get_thread_num());
      }
      return size;
    }
    """
    (tmp_path / "region.cpp").write_text(textwrap.dedent(source))
    command = ["g++", "-fopenmp", "-shared", "-fPIC", "region.cpp", "-o", "region.so"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    run_script(
        f"""
        import ctypes
        expected = conv().numpy()
        results = {{}}
        body = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda thread: results.update({{thread: conv().numpy()}}))
        region = ctypes.CDLL({str(tmp_path / "region.so")!r})
        assert region.in_parallel(body) == 2
        assert sorted(results) == [0, 1], "a call inside the region failed"
        assert all(numpy.array_equal(result, expected) for result in results.values())
        """
    )


HUGE_PAGES = """
import torch, fastconv.functional as FF

def flags(address):
    found = ""
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            inside = first <= address < last
        elif line.startswith("VmFlags") and inside:
            found = line
    return found.split()

y = FF.batch_norm(torch.randn(8, 64, 80, 80), None, None, training=True)  # 13 MB
small = FF.batch_norm(torch.randn(1, 64, 8, 8), None, None, training=True)
asked = "hg" in flags(y.data_ptr() + y.nbytes // 2)
assert asked == (sys.argv[1:] != ["0"]), asked
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
@pytest.mark.parametrize("value", ["", "0"])
def test_large_results_ask_for_huge_pages(value: str) -> None:
    environment = {**os.environ, "FASTCONV_HUGE_PAGES": value}
    done = subprocess.run(
        [sys.executable, "-c", "import sys" + HUGE_PAGES, value],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators decide by themselves what they keep")
def test_freed_results_are_not_handed_back_to_the_system() -> None:
    run_script("""
        import resource
        import fastconv
        fastconv.kernels()  # loads the compiled module

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(8):
                kept = [torch.empty(3 << 20, dtype=torch.uint8).fill_(1) for _ in range(5)]
                del kept
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        faults()
        assert faults() < 100, "15 MB are 3840 pages"
    """)
