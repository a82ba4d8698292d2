"""The training loop. Every training of this project is a `Training`: parameters, batches, a loss and a way to save.

    def train(self, folder: Path) -> Path:  # of a config
        def build() -> Training[Tensor]:
            net = Denoiser().to(default_device())
            optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr)
            average = MovingAverage(net)
            return Training(
                parameters=dict(net.named_parameters()),
                batch=partial(draw_images, self),  # a function of the number alone
                loss=lambda images, number: {"mse": denoising_loss(net, images, make_generator(self.seed, number))},
                optimizer=optimizer,
                schedule=cosine_schedule(optimizer, self.steps, warmup=50),
                average=average,
                steps=self.steps,
                save=lambda step: save_net(folder / "weights", average.module),
            )

        return fit(folder, {"train": "denoiser", **asdict(self)}, build) / "weights"

`fit` owns the run folder: it fails early, writes a row a step, checkpoints, and resumes exactly. `optimize` is the loop
alone, for a stage of a larger work that has its own run folder.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.core.devices import mixed_precision
from codefend.core.progress import progress
from codefend.core.runs import Row, check_run, open_run
from codefend.training.parallel import Processes
from codefend.types import CodefendError

Batch = TypeVar("Batch")
Model = TypeVar("Model", bound=nn.Module)
Losses = Mapping[str, Tensor | float]
Log = Callable[[Row], object]

CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Training(Generic[Batch]):
    """What is trained, on which batches, by which loss, and how its weights are saved.

    A step has ``micro`` micro-batches, whose gradients are averaged. They are numbered on from step to step (the number
    is the step where ``micro`` is 1), and a batch, its noise and every other random draw must depend on that number
    alone: then a resumed training and one in several processes have the same curve.
    """

    parameters: Mapping[str, nn.Parameter]
    """What is trained, by the names that a checkpoint gives them."""
    batch: Callable[[int], Batch]
    """The micro-batch of this number, on the CPU. Picklable: a GPU's batches are drawn ahead, in other processes."""
    loss: Callable[[Batch, int], Losses]
    """The terms of a micro-batch's loss by name, given its number. Tensors are weighted scalar terms, whose sum is
    minimized. Plain numbers are logged only. Every call returns the same names."""
    optimizer: Optimizer
    """AdamW or Adam over the same parameters, with a learning rate for each of its groups."""
    schedule: LRScheduler
    """Of the optimizer's learning rates; a function of the step number."""
    steps: int
    save: Callable[[int], None] | None = None
    """Write the weights after this many steps: every ``save_every`` steps and after the last."""
    save_every: int = 50
    average: MovingAverage[Any] | None = None
    """Of the same parameters in the same order."""
    micro: int = 1
    clip: float | None = 1.0
    """Norm to which the gradient is clipped; None: no clipping."""
    prepare: Callable[[Log], None] | None = None
    """A stage before the first step of a new run. It may append rows; the first checkpoint holds its result."""


def fit(folder: str | Path, config: Mapping[str, Any], build: Callable[[], Training[Batch]]) -> Path:
    """Train what ``build`` returns in the run folder ``folder`` and return it; the same call resumes.

    ``config`` is what the folder records; another one is refused on resumption. ``build`` loads data and models and is
    called before the folder exists, so that a wrong name fails early. Every step appends a row: the
    loss terms, "loss" (their sum), "grad_norm" before clipping, "rate" (share of the learning rate) and "seconds".

    Under ``accelerate launch`` the processes share the micro-batches, and the first one writes.

    Raises CodefendError when the folder holds another config, steps, batch, lr or save_every in ``config`` are not
    above 0, the micro-batches cannot be shared by the processes, or
    the loss is not finite; otherwise as ``build`` does.
    """
    folder = Path(folder)
    for name in ("steps", "batch", "lr", "save_every"):
        if name in config and not config[name] > 0:
            raise CodefendError(f"{name} must be above 0, not {config[name]}")
    check_run(folder, config)
    processes = Processes.join()
    training = build()
    processes.check_micro(training.micro)
    with open_run(folder, config) if processes.main else nullcontext() as run:
        processes.wait()
        append: Log = run.append if run is not None else _ignore
        checkpoint = folder / CHECKPOINT_FILE
        if training.prepare and not checkpoint.exists():
            training.prepare(append)
            if processes.main:
                save_training(checkpoint, training, 0)
            processes.wait()
        start = restore_training(checkpoint, training)
        label = str(config.get("train", "training"))
        bar = progress(label, training.steps, done=start) if run is not None else nullcontext(_ignore)
        with bar as advance:
            for step, row in optimize(training, checkpoint, start=start, processes=processes):
                append({"key": f"step-{step}", "step": step, **row})
                advance(1, f"loss {row['loss']:.3f}")
    return folder


def _ignore(*_: object) -> None:
    """Stand in for the run folder and the progress bar in the processes that must not write."""


def optimize(
    training: Training[Batch], checkpoint: Path | None = None, *, start: int = 0, processes: Processes | None = None
) -> Iterator[tuple[int, Row]]:
    """Yield the number of steps done and a row after each step from ``start`` on; log it before asking for the next.

    Weights are saved when the row is consumed, and then the checkpoint, if there is to be one. Raises CodefendError
    for a loss that is not finite.
    """
    processes = processes or Processes()
    device = next(iter(training.parameters.values())).device
    _fast_forward(training.schedule, start)
    batches = partial(_micro_batches, training.batch, training.micro, processes.rank, processes.count)
    for step, own in enumerate(_prefetch(batches, start, training.steps, device), start=start + 1):
        started = time.perf_counter()
        row = _step(training, own, step, device, processes)
        yield step, {**row, "seconds": time.perf_counter() - started}
        if processes.main and (step % training.save_every == 0 or step == training.steps):
            if training.save:
                training.save(step)
            if checkpoint:
                save_training(checkpoint, training, step)  # last: a checkpoint's weights are always there


def _step(
    training: Training[Batch],
    batches: Sequence[tuple[int, Batch]],
    step: int,
    device: torch.device,
    processes: Processes,
) -> Row:
    """One step of the optimizer on this process's numbered micro-batches."""
    parameters = list(training.parameters.values())
    group = training.optimizer.param_groups[0]
    rate = group["lr"] / group["initial_lr"] if group["initial_lr"] else 0.0
    training.optimizer.zero_grad()
    losses = [_backward(training, number, batch, device) for number, batch in batches]
    processes.sum_gradients(parameters)
    row = _mean_losses(losses, training.micro, processes)
    if not all(math.isfinite(value) for value in row.values()):
        raise CodefendError(f"the loss is not finite at step {step}; use a lower learning rate in a new run")
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if training.clip is None else training.clip)
    if not math.isfinite(norm):  # before a weight changes: every later step would start from it
        raise CodefendError(f"the gradient is not finite at step {step}; use a lower learning rate in a new run")
    training.optimizer.step()
    training.schedule.step()
    if training.average is not None:
        training.average.update()
    return {**row, "grad_norm": float(norm), "rate": rate}


def _backward(training: Training[Batch], number: int, batch: Batch, device: torch.device) -> Losses:
    """Add the gradients of one micro-batch; its losses, detached."""
    with mixed_precision(device):
        losses = training.loss(batch, number)
    terms = [value for value in losses.values() if isinstance(value, Tensor)]
    (torch.stack(terms).sum() / training.micro).backward()
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in losses.items()}


def _mean_losses(losses: Sequence[Losses], micro: int, processes: Processes) -> dict[str, float]:
    """Each term's mean over the micro-batches of all processes; plain numbers over this process's (a bool: any)."""
    terms = [name for name, value in losses[0].items() if isinstance(value, Tensor)]
    values = [torch.stack([torch.as_tensor(loss[name]).float() for name in terms]) for loss in losses]
    means = (processes.sum(torch.stack(values).sum(0)) / micro).tolist()
    row: dict[str, float] = {"loss": sum(means), **dict(zip(terms, means, strict=True))}
    for name in losses[0].keys() - set(terms):
        numbers = [float(loss[name]) for loss in losses]
        row[name] = any(numbers) if isinstance(losses[0][name], bool) else fmean(numbers)
    return row


# --- batches ---------------------------------------------------------------------------------------------------------


def _micro_batches(
    batch: Callable[[int], Batch], micro: int, rank: int, count: int, step: int
) -> list[tuple[int, Batch]]:
    """The numbers and micro-batches of process ``rank`` of ``count`` in a step; numbers count on from step to step."""
    return [(number, batch(number)) for number in range(step * micro + rank, (step + 1) * micro, count)]


class _Steps(Dataset[Batch], Generic[Batch]):
    """`Dataset` of the batches of every step."""

    def __init__(self, batch: Callable[[int], Batch]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> Batch:
        return self.batch(step)


def _prefetch(batch: Callable[[int], Batch], start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    """Yield ``batch(start)`` to ``batch(stop - 1)`` in order.

    A GPU would wait for images to be drawn, so other processes draw them ahead. Training on the CPU has no core to
    spare for that.
    """
    workers = 0 if device.type == "cpu" else max(1, min(12, (os.cpu_count() or 2) - 2))
    numbers: range = range(start, stop)
    yield from DataLoader(_Steps(batch), batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_same)


def _same(batch: Batch) -> Batch:
    return batch


# --- optimizer, schedule and moving average --------------------------------------------------------------------------


def decay_groups(parameters: Iterable[nn.Parameter], decay: float, **options: float) -> list[dict[str, Any]]:
    """Groups of an optimizer: weight ``decay`` for matrices and convolutions only; ``options`` hold for both."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        groups[parameter.dim() <= 1].append(parameter)
    return [{"params": group, "weight_decay": d, **options} for group, d in zip(groups, (decay, 0.0), strict=True)]


def cosine_rate(step: int, steps: int, *, warmup: int, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear warm-up, then a half cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    progressed = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progressed)))


def cosine_schedule(optimizer: Optimizer, steps: int, *, warmup: int) -> LambdaLR:
    """`cosine_rate` on the learning rate of each of the optimizer's groups."""
    return LambdaLR(optimizer, partial(cosine_rate, steps=steps, warmup=warmup))


def held_rate(step: int, steps: int, *, warmup: int, decay: float) -> float:
    """Factor of the learning rate: linear warm-up, constant, then linear to 0 over the last ``decay`` of the steps.

    While it is constant it does not depend on ``steps``, so a longer training has the same start (Hu et al. 2024,
    arXiv 2404.06395).
    """
    rise, fall = (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps)
    return min(1.0, rise, fall)


def _fast_forward(schedule: LRScheduler, step: int) -> None:
    """Set the learning rates of ``step``, without a state to load: they are a function of it."""
    if step:
        schedule.last_epoch = step - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's step, which was before the interruption
            schedule.step()


class MovingAverage(AveragedModel, Generic[Model]):
    """An exponential moving average of a model's parameters, with a shorter memory at the start.

    The decay after n updates is min(``decay``, (1 + n) / (10 + n)). ``module`` is a copy of the model with the averaged
    parameters. Where a copy of the whole model would cost too much, average an ``nn.ParameterList``.
    """

    module: Model

    def __init__(self, model: Model, decay: float = 0.998) -> None:
        super().__init__(model, multi_avg_fn=partial(_average, decay=decay))
        self.n_averaged.fill_(1)  # the initial parameters count, which torch would overwrite with the first update
        self._source = (model,)  # in a tuple: no submodule

    @property
    def source(self) -> Model:
        """The model itself."""
        return self._source[0]

    def update(self) -> None:
        """Update the average with the model's current parameters."""
        self.update_parameters(self.source)


def _average(averages: Sequence[Tensor], parameters: Sequence[Tensor], updates: Tensor, *, decay: float) -> None:
    n = int(updates)
    for average, parameter in zip(averages, parameters, strict=True):
        average.lerp_(parameter, 1 - min(decay, (1 + n) / (10 + n)))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_training(path: Path, training: Training[Any], step: int) -> None:
    """Write parameters, moments and average as one atomic file. Raises CodefendError when it cannot be written."""
    tensors = {f"net/{name}": value.detach() for name, value in training.parameters.items()}
    tensors |= {f"average/{name}": value for name, value in averaged_parameters(training).items()}
    for name, parameter in training.parameters.items():
        for key, value in training.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value)
    updates = 0 if training.average is None else int(training.average.n_averaged) - 1
    save_checkpoint(path, tensors, {"step": step, "updates": updates})


def restore_training(path: Path, training: Training[Any]) -> int:
    """Undo `save_training` and return the step to resume from; 0 where there is no file yet.

    Raises CodefendError when the file is damaged.
    """
    if not path.exists():
        return 0
    tensors, state = load_checkpoint(path)
    for name, parameter in training.parameters.items():
        parameter.data.copy_(tensors[f"net/{name}"])
        if f"step/{name}" in tensors:  # Adam keeps its count on the CPU, its moments on the parameter's device
            moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            training.optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
    for name, value in averaged_parameters(training).items():
        value.copy_(tensors[f"average/{name}"])
    if training.average is not None:
        training.average.n_averaged.fill_(int(state["updates"]) + 1)
    return int(state["step"])


def averaged_parameters(training: Training[Any]) -> dict[str, Tensor]:
    """The moving average by the parameters' names; empty where there is none."""
    if training.average is None:
        return {}
    values = (parameter.detach() for parameter in training.average.module.parameters())
    return dict(zip(training.parameters, values, strict=True))
