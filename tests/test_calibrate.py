"""tools/calibrate.py on made-up times, and on a network small enough to be measured: how fast anything is is never a test."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYER = "conv2d_fwd n1c64h14k64r3p1 nhwc"


@pytest.fixture(scope="module")
def calibrate() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("calibrate", ROOT / "tools" / "calibrate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibrate"] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["calibrate"]


def verdict(calibrate: ModuleType, times: dict[str, float], costs: dict[str, float], **changes: str) -> Any:
    """Of one layer, on which the choice is what the costs say."""
    choice = {"chosen": min(costs, key=costs.__getitem__), "fastest": min(times, key=times.__getitem__)}
    where = {"op": "conv2d_fwd", "layer": "n1c8h4k8r1", "layout": "nhwc"} | choice | changes
    return calibrate.Verdict(**where, setting=calibrate.Setting(1, 1, False), times=times, costs=costs)


def test_the_choice_is_the_installed_fastconvs(calibrate: ModuleType) -> None:
    (found,) = calibrate.verdicts({"layers": {LAYER: {"n1t1": {"direct": 1.0}}}})
    assert found.chosen == min(found.costs, key=found.costs.__getitem__)
    (found,) = calibrate.verdicts({"layers": {LAYER: {"n1t1": found.costs}}})
    assert (found.fastest, found.loss) == (found.chosen, 1.0)
    assert calibrate.penalty([found], {}) == 0.0


def test_a_slow_choice_is_a_miss_that_a_factor_mends(calibrate: ModuleType) -> None:
    missed = verdict(calibrate, {"direct": 2.0, "im2col": 1.0}, {"direct": 1.0, "im2col": 1.1})
    assert missed.loss == 2.0
    assert calibrate.penalty([missed], {}) == 1 + 10
    factors = calibrate.fitted([missed])
    assert calibrate.penalty([missed], factors) == 0.0
    assert factors["direct"] > 1 or factors["im2col"] < 1


def test_less_exact_algorithms_are_not_favoured(calibrate: ModuleType) -> None:
    kept = calibrate._exactness_kept
    assert kept({"winograd_f2x3": 1.0, "winograd_f4x3": 1.1, "winograd_f6x3": 1.2})
    assert not kept({"winograd_f4x3": 1.2, "winograd_f6x3": 1.1})
    assert not kept({"winograd_f4x3": 0.9})


def test_algorithms_of_the_same_code_count_as_one(calibrate: ModuleType) -> None:
    times = {"im2col": 2.0, "pointwise": 1.0, "direct": 3.0}
    found = verdict(calibrate, times, {"im2col": 1.0}, op="conv2d_wgrad", layout="nchw")
    assert found.loss == 1.0
    assert found.loss_of("direct") == 3.0


def test_settings_come_back(calibrate: ModuleType) -> None:
    for setting in (calibrate.Setting(8, 2, True), calibrate.Setting(1, 1, False)):
        assert calibrate.Setting.parse(str(setting)) == setting


def test_lenet_is_measured_reported_and_fitted(
    calibrate: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, factors = tmp_path / "selection.json", tmp_path / "calibration.def"
    calibrate.measure(
        argparse.Namespace(file=file, models=["lenet5"], op=["conv2d_fwd"], batch=[1], threads=[1], frozen=False)
    )
    kept = json.loads(file.read_text())["layers"]
    assert {key.split()[1] for key in kept} == {"n1c1h32k6r5", "n1c6h14k16r5"}
    assert all(seconds > 0 for settings in kept.values() for times in settings.values() for seconds in times.values())
    calibrate.report(argparse.Namespace(file=file, misses=1, keep=True))
    assert "of 4 (" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["layers"] == kept
    assert sum(share["layers"] for share in found["choices"]["shares"]) == 4
    factors.write_text("// a comment\n")
    calibrate.fit(argparse.Namespace(file=file, write=factors))
    lines = factors.read_text().splitlines()
    assert lines[0] == "// a comment"
    assert all(calibrate._FACTOR_LINE.fullmatch(line) for line in lines[1:])
