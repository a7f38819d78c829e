"""No kernel reads or writes a byte that is not its own: operands flush against pages that may not be touched.

(Canaries around and between the elements, and outputs that start as canaries, are part of every test in test_kernels.)
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import warnings
from collections.abc import Callable

import pytest

from fastconv.testing import fill, harness
from fastconv.testing.buffers import Place
from fastconv.testing.problems import Case

_REPORT_BYTES = 1 << 16


def run_in_child(work: Callable[[Callable[[str], None]], None]) -> str:
    """Runs work(note) in a forked child: '' if it returns, otherwise its exception, or its signal and its last note."""
    report = mmap.mmap(-1, _REPORT_BYTES)

    def note(text: str) -> None:
        data = text.encode()[: _REPORT_BYTES - 1]
        report[: len(data) + 1] = data + b"\0"

    with warnings.catch_warnings():
        # Newer Pythons warn about forking with threads; the child runs kernels serially, see core/parallel.h.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        faulthandler.disable()  # the crash is reported by its signal and the last note
        try:
            work(note)
            code = 0
        except BaseException as error:
            note(f"{type(error).__name__}: {error}")
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    text = report[:_REPORT_BYTES].split(b"\0")[0].decode(errors="replace")
    if os.WIFSIGNALED(status):
        return f"{signal.Signals(os.WTERMSIG(status)).name} in: {text}"
    return text if os.WEXITSTATUS(status) else ""


@pytest.mark.parametrize("place", ["low", "high"])
def test_guard_pages(kernel: str, place: Place) -> None:
    cases: tuple[Case, ...] = harness.checked(kernel)
    if place == "low":
        cases = cases[::3]  # what reads before a tensor starts is an offset, and no tail: fewer sizes show it
    op, _, dtype, _ = kernel.split(".")
    for case in cases:
        harness.problem_data(op, case, fill.integers, dtype)  # once, in the parent

    def work(note: Callable[[str], None]) -> None:
        for case in cases:
            note(harness.repro(kernel, case, fill.integers, False, 1, place))
            harness.check(kernel, case, fill.integers, place=place)

    assert not (failure := run_in_child(work)), failure


def test_the_child_reports_a_crash() -> None:
    def crash(note: Callable[[str], None]) -> None:
        note("the last problem")
        os.kill(os.getpid(), signal.SIGSEGV)

    assert run_in_child(crash) == "SIGSEGV in: the last problem"


def test_the_child_reports_an_exception() -> None:
    def fail(note: Callable[[str], None]) -> None:
        raise harness.KernelFault("wrong")

    assert run_in_child(fail) == "KernelFault: wrong"
