"""The training check: one network learns handwritten digits on two backends from the same start."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from fastconv.commands import CommandError, require
from fastconv.commands.console import print_heading, print_table
from fastconv.commands.twins import build_twins, count_fallbacks


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: SGD with momentum and a cosine schedule, each image moved by up to ``shift`` pixels.

    ``loss_tolerance`` bounds the difference of the two backends' losses, in nats, at every single step. Rounding differs
    from the first step on and the weights drift apart with it: torch differs from itself, with and without oneDNN, by up to
    1.1e-6 over this run, so 1e-5 leaves room for another order of summation and none for a wrong gradient.
    """

    epochs: int = 12
    batch: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    shift: int = 2
    seed: int = 0
    loss_tolerance: float = 1e-5
    min_accuracy: float = 0.97


RECIPES = {"lenet5": Recipe()}


@dataclass
class Run:
    """One backend's training: the loss of each step, seconds in all, accuracy on the digits kept back."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: float = 0.0

    def step(self, x: Tensor, labels: Tensor) -> None:
        """One optimiser step on a batch."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.network(x), labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start

    def evaluate(self, x: Tensor, labels: Tensor) -> None:
        """Set ``accuracy`` to the share of ``labels`` that the network finds."""
        self.network.eval()
        with torch.inference_mode():
            self.accuracy = float((self.network(x).argmax(1) == labels).double().mean())


def check(name: str, plot: str | None = None) -> dict[str, Any]:
    """Train model ``name`` on both backends, print and return the findings, draw the loss curves to the file ``plot``.

    CommandError if there is no recipe for the model, or the demo extra is missing.
    """
    if name not in RECIPES:
        raise CommandError(f"--train cannot train {name}; it trains {', '.join(RECIPES)}")
    require("sklearn", "matplotlib")
    recipe = RECIPES[name]
    plot_path = Path(plot or f"{name}-training.png")
    before = count_fallbacks()
    ours, theirs = train_twins(name, recipe)
    fallbacks = dict(count_fallbacks() - before)

    difference = (torch.tensor(ours.losses).double() - torch.tensor(theirs.losses).double()).abs()
    max_difference = float(difference.max())
    curves_agree = max_difference <= recipe.loss_tolerance
    learnt = min(ours.accuracy, theirs.accuracy) >= recipe.min_accuracy
    draw(plot_path, name, ours.losses, theirs.losses, recipe.loss_tolerance)

    print_heading(f"{name}, {len(ours.losses)} steps of {recipe.batch} digits, threads: {torch.get_num_threads()}")
    rows = [
        [backend, f"{run.losses[0]:.6f}", f"{run.losses[-1]:.6f}", f"{run.accuracy:.2%}", f"{run.seconds:.2f}"]
        for backend, run in (("fastconv", ours), ("torch", theirs))
    ]
    print_table(("backend", ">first loss", ">last loss", ">test accuracy", ">seconds"), rows)
    print_heading("Verdict")
    print(
        f"largest difference of the losses at any step: {max_difference:.3g} (limit {recipe.loss_tolerance:g}): "
        f"{'the curves agree' if curves_agree else 'THE CURVES DISAGREE'}"
    )
    print(f"test accuracy of at least {recipe.min_accuracy:.0%} on both: {'yes' if learnt else 'NO'}")
    for reason, count in fallbacks.items():
        print(f"fell back to torch {count} times: {reason}")
    if not fallbacks:
        print("fallbacks to torch: none")
    print(f"picture: {plot_path}")
    return {
        "model": name,
        "threads": torch.get_num_threads(),
        "recipe": vars(recipe),
        "losses": {"fastconv": ours.losses, "torch": theirs.losses},
        "max_loss_difference": max_difference,
        "accuracy": {"fastconv": ours.accuracy, "torch": theirs.accuracy},
        "seconds": {"fastconv": ours.seconds, "torch": theirs.seconds},
        "fallbacks": fallbacks,
        "plot": str(plot_path),
        "passed": curves_agree and learnt and not fallbacks,
    }


def train_twins(name: str, recipe: Recipe) -> tuple[Run, Run]:
    """Train on fastconv and on torch, step by step on the same batches, under a progress bar; evaluated on return."""
    (x, labels), (test_x, test_labels) = load_digits(recipe.seed)
    steps_per_epoch = len(x) // recipe.batch
    steps = recipe.epochs * steps_per_epoch
    ours, theirs = (_start(network, recipe, steps) for network in build_twins(name, recipe.seed))
    generator = torch.Generator().manual_seed(recipe.seed)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, TextColumn("{task.fields[losses]}"), console=Console(stderr=True))
    with progress:
        task = progress.add_task(f"training {name} twice", total=steps, losses="")
        for _ in range(recipe.epochs):
            order = torch.randperm(len(x), generator=generator)
            for batch in order[: steps_per_epoch * recipe.batch].view(steps_per_epoch, recipe.batch):
                shifted = _shift(x[batch], recipe.shift, generator)
                ours.step(shifted, labels[batch])
                theirs.step(shifted, labels[batch])
                shown = f"loss fastconv {ours.losses[-1]:.4f}  torch {theirs.losses[-1]:.4f}"
                progress.update(task, advance=1, losses=shown)
    for run in (ours, theirs):
        run.evaluate(test_x, test_labels)
    return ours, theirs


def _shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each (1, H, W) image of x moved by its own random number of pixels, up to ``most``, in both directions."""
    n, _, height, width = x.shape
    down, right = torch.randint(-most, most + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) - down) % height
    columns = (torch.arange(width) - right) % width
    return x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def _start(network: nn.Module, recipe: Recipe, steps: int) -> Run:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)
    return Run(network, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))


def load_digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1797 digits as (images, labels) to train on, four fifths, and to test on, evenly by class.

    The 8×8 images are enlarged to 24×24 and framed to LeNet's 32×32, so that shifts of up to 4 pixels lose no ink;
    images have shape (n, 1, 32, 32), zero mean and unit variance over all of them.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    x = torch.from_numpy(digits.images).float().unsqueeze(1)
    x = functional.pad(functional.interpolate(x, size=(24, 24), mode="bilinear", align_corners=False), (4, 4, 4, 4))
    x = (x - x.mean()) / x.std()
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(x)), test_size=0.2, stratify=digits.target, random_state=seed)
    return (x[train], labels[train]), (x[test], labels[test])


def draw(path: Path, name: str, ours: list[float], theirs: list[float], tolerance: float) -> None:
    """Write a picture: both loss curves above, below it the size of their difference with the tolerance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = range(1, len(ours) + 1)
    difference = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    curves.plot(steps, theirs, color="tab:orange", linewidth=3.5, alpha=0.5, label="torch")
    curves.plot(steps, ours, color="tab:blue", linewidth=0.9, label="fastconv")
    curves.set(yscale="log", ylabel="training loss (cross-entropy, nats)")
    curves.set_title(f"{name} on scikit-learn's digits: the same start and batches on two backends")
    curves.legend()
    gap.plot(steps, difference, ".", color="tab:green", markersize=3, label="difference (zeros not shown)")
    gap.axhline(tolerance, color="tab:red", linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")
    gap.set(yscale="log", xlabel="optimiser step", ylabel="|loss fastconv − loss torch|")
    gap.legend()
    for axes in (curves, gap):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
