"""The training check: one network learns a task on two backends from the same start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fastconv.commands import CommandError, require
from fastconv.commands.console import print_heading, print_table
from fastconv.commands.dates import Dates
from fastconv.commands.digits import Digits
from fastconv.commands.twins import build_twins, count_fallbacks

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """What is learned, and how: a frozen dataclass of its numbers.

    ``loss_tolerance`` bounds the difference of the two backends' losses, in nats, at each of the first ``compared`` steps.
    ``title`` names the data in the picture, ``unit`` what a batch is a number of, ``extras`` the packages that are needed,
    ``config`` the model's keywords.
    """

    @property
    def seed(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def loss_tolerance(self) -> float: ...
    @property
    def compared(self) -> int: ...
    @property
    def min_accuracy(self) -> float: ...
    @property
    def title(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def extras(self) -> tuple[str, ...]: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def steps(self) -> int: ...
    def batches(self) -> Iterator[Batch]:
        """``steps`` batches, the same ones every time."""
        ...

    def optimise(self, network: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]: ...
    def loss(self, network: nn.Module, batch: Batch) -> Tensor: ...
    def accuracy(self, network: nn.Module) -> float:
        """The share of what was kept back that the network, in eval mode, gets right."""
        ...


RECIPES: dict[str, Task] = {"lenet5": Digits(), "transformer": Dates()}


@dataclass
class Run:
    """One backend's training: the loss of each step, seconds in all, accuracy on what was kept back."""

    task: Task
    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: float = 0.0

    @classmethod
    def begin(cls, task: Task, network: nn.Module) -> Run:
        return cls(task, network.train(), *task.optimise(network))

    def step(self, batch: Batch) -> None:
        """One optimiser step on a batch."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.network, batch)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start

    def evaluate(self) -> None:
        self.network.eval()
        with torch.inference_mode():
            self.accuracy = self.task.accuracy(self.network)


def check(name: str, plot: str | None = None) -> dict[str, Any]:
    """Train model ``name`` on both backends, print and return the findings, draw the loss curves to the file ``plot``.

    CommandError if there is no recipe for the model, or the demo extra is missing.
    """
    if name not in RECIPES:
        raise CommandError(f"--train cannot train {name}; it trains {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    require(*recipe.extras)
    plot_path = Path(plot or f"{name}-training.png")
    before = count_fallbacks()
    ours, theirs = train_twins(name, recipe)
    fallbacks = dict(count_fallbacks() - before)

    difference = (torch.tensor(ours.losses).double() - torch.tensor(theirs.losses).double()).abs()
    max_difference = float(difference[: recipe.compared].max())
    stretch = "step" if recipe.compared >= len(ours.losses) else f"of the first {recipe.compared} steps"
    curves_agree = max_difference <= recipe.loss_tolerance
    learnt = min(ours.accuracy, theirs.accuracy) >= recipe.min_accuracy
    draw(plot_path, f"{name} on {recipe.title}", ours.losses, theirs.losses, recipe)

    print_heading(
        f"{name}, {len(ours.losses)} steps of {recipe.batch} {recipe.unit}, threads: {torch.get_num_threads()}"
    )
    rows = [
        [backend, f"{run.losses[0]:.6f}", f"{run.losses[-1]:.6f}", f"{run.accuracy:.2%}", f"{run.seconds:.2f}"]
        for backend, run in (("fastconv", ours), ("torch", theirs))
    ]
    print_table(("backend", ">first loss", ">last loss", ">test accuracy", ">seconds"), rows)
    print_heading("Verdict")
    print(
        f"largest difference of the losses at any {stretch}: {max_difference:.3g} (limit {recipe.loss_tolerance:g}): "
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
        "recipe": asdict(recipe),  # type: ignore[call-overload]
        "losses": {"fastconv": ours.losses, "torch": theirs.losses},
        "max_loss_difference": max_difference,
        "accuracy": {"fastconv": ours.accuracy, "torch": theirs.accuracy},
        "seconds": {"fastconv": ours.seconds, "torch": theirs.seconds},
        "fallbacks": fallbacks,
        "plot": str(plot_path),
        "passed": curves_agree and learnt and not fallbacks,
    }


def train_twins(name: str, task: Task) -> tuple[Run, Run]:
    """Train on fastconv and on torch, step by step on the same batches, under a progress bar; evaluated on return."""
    ours, theirs = (Run.begin(task, network) for network in build_twins(name, task.seed, **task.config))
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, TextColumn("{task.fields[losses]}"), console=Console(stderr=True))
    with progress:
        bar = progress.add_task(f"training {name} twice", total=task.steps, losses="")
        for batch in task.batches():
            ours.step(batch)
            theirs.step(batch)
            shown = f"loss fastconv {ours.losses[-1]:.4f}  torch {theirs.losses[-1]:.4f}"
            progress.update(bar, advance=1, losses=shown)
    for run in (ours, theirs):
        run.evaluate()
    return ours, theirs


def draw(path: Path, title: str, ours: list[float], theirs: list[float], task: Task) -> None:
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
    curves.set_title(f"{title}: the same start and batches on two backends")
    curves.legend()
    gap.plot(steps, difference, ".", color="tab:green", markersize=3, label="difference (zeros not shown)")
    limit = task.loss_tolerance
    gap.hlines(
        limit,
        1,
        min(task.compared, len(ours)),
        color="tab:red",
        linestyle="--",
        linewidth=1,
        label=f"tolerance {limit:g}",
    )
    gap.set(yscale="log", xlabel="optimiser step", ylabel="|loss fastconv − loss torch|")
    gap.legend()
    for axes in (curves, gap):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
