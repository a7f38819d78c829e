"""The ``fastconv`` command: what it prints, what it writes, and the exit status it ends with."""

from __future__ import annotations

import datetime
import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fastconv
from fastconv import models
from fastconv.cli import main

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Small networks make the check's logic quick to test; that every model agrees is test_models.py's business.
QUICK = ("--rounds", "1")


@pytest.fixture
def no_demo_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if pillow, scikit-learn and matplotlib were not installed."""
    find_spec = importlib.util.find_spec
    hidden = ("PIL", "sklearn", "matplotlib")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find_spec(name, *rest)
    )


def fails_with(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command which could not run wrote to stderr."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# ---- The command itself ----------------------------------------------------------------------------------------------


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fastconv", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, f"fastconv {fastconv.__version__}")


def test_help_loads_neither_torch_nor_the_compiled_module() -> None:
    code = (
        "import sys, fastconv.cli\n"
        "try: fastconv.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'fastconv._C'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert all(command in done.stdout for command in ("info", "check", "bench"))


@pytest.mark.parametrize("argv", [[], ["unknown"], ["check"], ["check", "lenet5", "--batch", "0"]])
def test_usage_errors(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (3, 3)])
def test_bench_gets_its_words_untouched(monkeypatch: pytest.MonkeyPatch, returned: int | None, status: int) -> None:
    bench, seen = ModuleType("fastconv.bench"), []
    bench.main = lambda argv: seen.append(argv) or returned
    monkeypatch.setitem(sys.modules, "fastconv.bench", bench)
    assert main(["bench", "--help", "conv2d", "--json", "x"]) == status
    assert seen == [["--help", "conv2d", "--json", "x"]]


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_says_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    build = fastconv.build_info()
    for fact in (torch.__version__, build["compiler"], build["machine"]["cpu"], ", ".join(build["machine"]["isa"])):
        assert fact in out
    assert f"{sum(k.runnable for k in fastconv.kernels())} of {len(fastconv.kernels())} run here" in out
    assert all(f"{kernel.op}.{kernel.algorithm} " in out for kernel in fastconv.kernels())
    assert [line.split() for line in out.splitlines() if "OMP_WAIT" in line] == [["OMP_WAIT_POLICY", "passive"]]


def test_info_lists_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--kernels"]) == 0
    listed = {tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines() if line.count(".") >= 3}
    assert {(kernel.name, "yes" if kernel.runnable else "no") for kernel in fastconv.kernels()} <= listed


def test_info_says_why_a_kernel_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    fastconv.plan.limit_isa("scalar")
    try:
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        barred = [kernel for kernel in fastconv.kernels() if not kernel.runnable]
    finally:
        fastconv.plan.limit_isa("")
    assert barred, "no kernel was barred, so this test says nothing"
    for kernel in barred:
        assert f"{kernel.target} kernels, in brackets above, do not run here: {kernel.why_not}" in out
    assert "(f32)" in out


def test_info_reports_a_module_that_does_not_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ImportError("built for another Python")

    monkeypatch.setattr(fastconv, "build_info", broken)
    assert main(["info"]) == 1
    out = capsys.readouterr().out
    assert "Kernels: none, built for another Python" in out
    assert torch.__version__ in out


# ---- check on a photograph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "shape"),
    [
        (["lenet5"], [1, 1, 32, 32]),
        (["lenet5", "--batch", "3", "--threads", "1"], [3, 1, 32, 32]),
        (["resnet18", "--channels-last"], [1, 3, 224, 224]),
    ],
    ids=["lenet5", "batch", "resnet18-nhwc"],
)
def test_check_agrees(argv: list[str], shape: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    assert main(["check", *argv, *QUICK, "--json", str(tmp_path / "found.json")]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "they agree" in out
    assert "fallbacks to torch: none" in out
    assert "weights are random" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["input"] == shape
    assert found["passed"]
    assert found["max_abs_error"] <= 1e-4 * found["max_abs_output"]
    assert found["seconds"]["fastconv"] > 0
    assert found["seconds"]["torch"] > 0
    assert [a["class"] for a in found["top"]["fastconv"]] == [b["class"] for b in found["top"]["torch"]]
    model = models.create(argv[0], layers=nn)
    kinds = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    assert {layer["name"] for layer in found["layers"]} == {n for n, m in model.named_modules() if isinstance(m, kinds)}
    known = {kernel.name for kernel in fastconv.kernels()}
    for layer in found["layers"]:
        assert layer["kernels"], layer["name"]
        assert set(layer["kernels"]) <= known
        assert layer["fastconv_s"] > 0
        assert layer["name"] in out
        assert layer["kernels"][0] in out


def test_check_of_a_vision_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms and attention are layers that have to run on kernels of ours too."""
    pytest.importorskip("sklearn")
    assert main(["check", "vit_tiny", "--threads", "1", *QUICK, "--json", str(tmp_path / "found.json")]) == 0
    assert "they agree" in capsys.readouterr().out
    layers = json.loads((tmp_path / "found.json").read_text())["layers"]
    assert Counter(layer["kind"] for layer in layers) == {
        "Conv2d": 1, "LayerNorm": 25, "MultiheadAttention": 12, "Linear": 25
    }  # fmt: skip
    ops = {layer["kind"]: {kernel.split(".")[0] for kernel in layer["kernels"]} for layer in layers}
    assert (ops["LayerNorm"], ops["MultiheadAttention"]) == ({"layer_norm_fwd"}, {"sdpa_fwd"})


def test_check_takes_weights_and_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    image = pytest.importorskip("PIL.Image")
    image.new("L", (40, 60), 128).save(tmp_path / "grey.png")
    model = models.create("lenet5", layers=nn)
    nn.init.zeros_(model.fc3.weight)
    model.fc3.bias.data.copy_(torch.arange(10.0))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    options = ["--weights", str(tmp_path / "w.pth"), "--image", str(tmp_path / "grey.png")]
    assert main(["check", "lenet5", *options, *QUICK, "--json", str(tmp_path / "found.json")]) == 0
    assert "weights are random" not in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [entry["class"] for entry in found["top"]["fastconv"]] == [9, 8, 7, 6, 5]
    assert (found["weights"], found["image"]) == (options[1], options[3])


def test_check_fails_when_the_backends_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    from fastconv.commands import twins

    compare = twins.compare

    def with_one_wrong_tap(model: nn.Module, twin: nn.Module, *rest: object, **more: object) -> twins.Comparison:
        model.conv2.weight.data[3, 2, 0, 0] += 0.01
        return compare(model, twin, *rest, **more)

    monkeypatch.setattr(twins, "compare", with_one_wrong_tap)
    assert main(["check", "lenet5", *QUICK]) == 1
    assert "THEY DISAGREE" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["both", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_fails_on_outputs_that_are_no_numbers(
    bad: float, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    from fastconv.commands import twins

    compare = twins.compare

    def poisoned(model: nn.Module, twin: nn.Module, *rest: object, **more: object) -> twins.Comparison:
        for network in (model, twin) if where == "both" else (twin,):
            network.fc3.bias.data[0] = bad
        return compare(model, twin, *rest, **more)

    monkeypatch.setattr(twins, "compare", poisoned)
    assert main(["check", "lenet5", *QUICK]) == 1
    assert "THEY DISAGREE" in capsys.readouterr().out


def test_check_of_a_network_that_puts_out_zeros(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    state = {key: torch.zeros_like(tensor) for key, tensor in models.create("lenet5", layers=nn).state_dict().items()}
    torch.save(state, tmp_path / "zeros.pth")
    assert main(["check", "lenet5", "--weights", str(tmp_path / "zeros.pth"), *QUICK]) == 0


def test_check_fails_on_a_fallback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from fastconv.commands import twins

    counts = iter([Counter({"conv2d: old": 5}), Counter({"conv2d: old": 5, "linear: no kernel for it": 2})])
    monkeypatch.setattr(twins, "count_fallbacks", lambda: next(counts))
    assert main(["check", "lenet5", *QUICK]) == 1
    out = capsys.readouterr().out
    assert "fell back to torch 2 times: linear: no kernel for it" in out
    assert "conv2d: old" not in out


def test_check_fails_on_a_layer_without_a_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    from fastconv.commands import twins

    compare = twins.compare

    def one_layer_on_torch(model: nn.Module, twin: nn.Module, *rest: object, **more: object) -> twins.Comparison:
        model.conv2 = twin.conv2
        return compare(model, twin, *rest, **more)

    monkeypatch.setattr(twins, "compare", one_layer_on_torch)
    assert main(["check", "lenet5", *QUICK]) == 1
    assert "NO FASTCONV KERNEL RAN in conv2" in capsys.readouterr().out


def test_fallbacks_are_counted_as_they_happen() -> None:
    from fastconv.commands.twins import count_fallbacks

    before = count_fallbacks()
    fastconv.set_fallback("silent")
    try:
        fastconv.functional.conv2d(
            torch.ones(1, 1, 3, 3, dtype=torch.bfloat16), torch.ones(1, 1, 3, 3, dtype=torch.bfloat16)
        )
    finally:
        fastconv.set_fallback("warn")
    new = count_fallbacks() - before
    assert sum(new.values()) == 1
    assert next(iter(new)).startswith("conv2d: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resnet19"], "no model named 'resnet19'; fastconv has lenet5, resnet18,"),
        (["lenet5", "--image", "missing.jpg"], "no image file missing.jpg"),
        (["lenet5", "--image", __file__], "is not an image that pillow can read"),
        (["lenet5", "--weights", "missing.pth"], "no weights file missing.pth"),
        (["lenet5", "--plot", "p.png"], "--plot is the picture of a training run: add --train"),
        (["resnet18", "--train"], "--train cannot train resnet18; it trains lenet5, transformer"),
        (["lenet5", "--train", "--batch", "2"], "--batch has no meaning with --train"),
    ],
)
def test_check_cannot_run(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert message in fails_with(capsys, "check", *argv)


@pytest.mark.usefixtures("no_demo_extra")
@pytest.mark.parametrize("argv", [["lenet5"], ["lenet5", "--train"]])
def test_missing_extra_is_one_sentence(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "pip install 'fastconv[demo]'" in fails_with(capsys, "check", *argv)


def test_photo_crops() -> None:
    image = pytest.importorskip("PIL.Image")
    from fastconv.commands.photo import photo_batch

    ramp = image.frombytes("RGB", (80, 40), bytes(x for _ in range(40) for x in range(80) for _ in "rgb"))
    crops = photo_batch(ramp, 4, 3, (35, 35))
    assert crops.shape == (4, 3, 35, 35)
    columns = crops[:, 0, 0]
    red = (columns * 0.229 + 0.485) * 255
    # The 40 pixels of height suffice for a crop of 35 as they are, so a column's value is its place in the photograph.
    assert torch.allclose(red[:, 0], torch.tensor([22.0, 0.0, 22.0, 45.0]), atol=0.51)
    assert torch.equal(photo_batch(ramp, 1, 3, (35, 35))[0], crops[0])
    assert torch.allclose(photo_batch(ramp, 1, 1, (35, 35))[0, 0], crops[0].mean(0))


# ---- check --train ---------------------------------------------------------------------------------------------------


def test_train_writes_curves_that_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from fastconv.commands import digits, train

    monkeypatch.setitem(train.RECIPES, "lenet5", digits.Digits(epochs=2, min_accuracy=0.5))
    plot, report = tmp_path / "new" / "curves.png", tmp_path / "found.json"
    assert main(["check", "lenet5", "--train", "--plot", str(plot), "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "the curves agree" in out
    assert "fallbacks to torch: none" in out
    assert plot.read_bytes().startswith(PNG_SIGNATURE)
    found = json.loads(report.read_text())
    assert len(found["losses"]["fastconv"]) == len(found["losses"]["torch"]) == 2 * 44
    assert found["losses"]["fastconv"][-1] < found["losses"]["fastconv"][0] / 2
    assert found["max_loss_difference"] <= 1e-5


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"min_accuracy": 1.1}, "test accuracy of at least 110% on both: NO"),
        ({"min_accuracy": 0.0, "loss_tolerance": -1.0}, "THE CURVES DISAGREE"),
    ],
    ids=["accuracy", "curves"],
)
def test_train_fails(
    recipe: dict[str, float],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from fastconv.commands import digits, train

    monkeypatch.setitem(train.RECIPES, "lenet5", digits.Digits(epochs=1, batch=256, **recipe))
    assert main(["check", "lenet5", "--train", "--plot", str(tmp_path / "curves.png")]) == 1
    assert message in capsys.readouterr().out


def test_train_transformer_on_dates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve steps: both backends go the same way, and the loss falls. Nothing is right yet, so that is not asked for."""
    pytest.importorskip("matplotlib")
    from fastconv.commands import dates, train

    monkeypatch.setitem(train.RECIPES, "transformer", dates.Dates(steps=12, batch=8, tests=5, min_accuracy=0.0))
    report = tmp_path / "found.json"
    argv = ["check", "transformer", "--train", "--plot", str(tmp_path / "curves.png"), "--json", str(report)]
    assert main(argv) == 0
    assert "the curves agree" in capsys.readouterr().out
    losses = json.loads(report.read_text())["losses"]["fastconv"]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]


def test_dates_are_written_as_people_write_them() -> None:
    from fastconv.commands import dates

    found = {" ".join(dates.written(datetime.date(1987, 3, 23), random.Random(seed))) for seed in range(60)}
    assert "the twenty third of march nineteen eighty seven" in found
    assert "march the twenty third , nineteen hundred and eighty seven" in found
    assert "monday , 2 3 march 1 9 8 7" in found
    assert "2 3 / 3 / 1 9 8 7" in found
    for year, words in ((1905, "nineteen oh five"), (2007, "two thousand and seven"), (1800, "eighteen hundred")):
        said = {" ".join(dates._year(year, random.Random(seed))) for seed in range(20)}
        assert words in said


def test_dates_kept_back_are_never_trained_on() -> None:
    from fastconv.commands import dates

    def meant(kept_back: bool) -> set[tuple[int, ...]]:
        _, targets = dates._translations(300, random.Random(3), kept_back)
        return {tuple(row.tolist()) for row in targets}

    assert not meant(True) & meant(False)


def test_images_are_moved_whole() -> None:
    from fastconv.commands.digits import _shift

    x = torch.randn(3, 1, 6, 5)
    moved = _shift(x, 2, torch.Generator().manual_seed(0))
    down, right = torch.randint(-2, 3, (2, 3, 1), generator=torch.Generator().manual_seed(0))
    for image, result, rows, columns in zip(x, moved, down, right):
        assert torch.equal(result, torch.roll(image, (int(rows), int(columns)), (1, 2)))
