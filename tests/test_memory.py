"""No kernel reads or writes a byte that is not its own: operands flush against pages that may not be touched.

(Canaries around and between the elements, and outputs that start as canaries, are part of every test in test_kernels.)
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import warnings
from collections.abc import Callable, Iterator

import pytest

from fastconv.testing import fill, harness

_BYTES = 1 << 16
Note = Callable[[str], None]


class Child:
    """A forked process that does one piece of work after another; where it dies of one, the next has another process.

    One for all kernels, which computes truths for itself, once for all kernels of an op: a fork of a process that holds thousands
    of problems takes longer than a kernel's checks.
    """

    def __init__(self) -> None:
        self._notes = mmap.mmap(-1, _BYTES)
        self._pid = self._orders = self._answers = 0

    def note(self, text: str) -> None:
        data = text.encode()[: _BYTES - 1]
        self._notes[: len(data) + 1] = data + b"\0"

    def _fork(self) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        with warnings.catch_warnings():
            # Newer Pythons warn about forking with threads; the child runs kernels serially, see core/parallel.h.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid:
            os.close(orders)
            os.close(answers)
            return
        try:
            os.close(self._orders)
            faulthandler.disable()  # the crash is reported by its signal and the last note
            while order := os.read(orders, _BYTES):
                kind, *words = order.decode().split()
                try:
                    WORK[kind](self.note, *words)
                    os.write(answers, b"+")
                except BaseException as error:
                    self.note(f"{type(error).__name__}: {error}")
                    os.write(answers, b"-")
        finally:
            os._exit(0)

    def run(self, order: str) -> str:
        """Does what `order` says: '' if that returns, otherwise its exception, or its signal and its last note."""
        if not self._pid:
            self._fork()
        self.note("")
        os.write(self._orders, order.encode())
        answer = os.read(self._answers, 1)
        text = self._notes[:_BYTES].split(b"\0")[0].decode(errors="replace")
        if answer:
            return text if answer == b"-" else ""
        status = self.close()
        return f"{signal.Signals(os.WTERMSIG(status)).name} in: {text}"

    def close(self) -> int:
        os.close(self._orders)
        os.close(self._answers)
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return status


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    child.run("nothing")  # forked before this process has problems in memory
    yield child
    child.close()


def check_guarded(note: Note, kernel: str, place: str) -> None:
    assert place in ("low", "high")
    cases = harness.checked(kernel)
    if place == "low":
        cases = cases[::3]  # what reads before a tensor starts is an offset, and no tail: fewer sizes show it
    for case in cases:
        note(harness.repro(kernel, case, fill.integers, False, 1, place))
        harness.check(kernel, case, fill.integers, place=place)


def crash(note: Note) -> None:
    note("the last problem")
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(note: Note) -> None:
    raise harness.KernelFault("wrong")


WORK: dict[str, Callable[..., None]] = {
    "nothing": lambda note: None, "guarded": check_guarded, "crash": crash, "fail": fail,
}  # fmt: skip


@pytest.mark.parametrize("place", ["low", "high"])
def test_guard_pages(child: Child, kernel: str, place: str) -> None:
    assert not (failure := child.run(f"guarded {kernel} {place}")), failure


def test_the_child_reports_a_crash_and_is_replaced() -> None:
    child = Child()
    for _ in range(2):
        assert child.run("crash") == "SIGSEGV in: the last problem"
    assert child.run("nothing") == ""
    assert child.close() == 0


def test_the_child_reports_an_exception_and_goes_on(child: Child) -> None:
    assert child.run("fail") == "KernelFault: wrong"
    assert child.run("nothing") == ""
