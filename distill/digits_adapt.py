"""Make the digits teacher sparse without data: its own dense velocity is the target, on its own trajectories.

The first half of "distil after sparsifying". Each sample of the batch walks one guided trajectory of the dense
teacher, one step an update, from noise to a clip and then anew; the places in the batch are spread over the steps, so
that every update sees all noise levels. At those points the sparse model regresses on the dense one's velocity, with
the class and without it, since it will be guided itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blade_compile.distill.config import RunConfig
from blade_compile.distill.digits_data import NUM_CLASSES
from blade_compile.distill.digits_model import NULL_CLASS, DigitsTransformer
from blade_compile.distill.digits_teacher import save_teacher
from blade_compile.distill.errors import DivergedError
from blade_compile.distill.objective import guide
from blade_compile.distill.randomness import generator


class Walk:
    """A batch of guided trajectories of the dense teacher, each at another of its steps.

    Args:
        velocity: the dense teacher, called as ``DigitsTransformer.forward``.
        shape: of a clip, ``(1, T, H, W)``.
        batch: number of trajectories.
        steps: of a trajectory, even from s = 1 to 0.
        cfg_scale: of the walk.
        seed: of noise and classes.
        device: where the teacher is.
    """

    def __init__(
        self,
        velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
        shape: tuple[int, ...],
        batch: int,
        *,
        steps: int,
        cfg_scale: float,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.velocity, self.steps, self.cfg_scale, self.device = velocity, steps, cfg_scale, device
        self.random = generator(seed, "adapting the teacher")
        self.place = torch.zeros(batch, dtype=torch.int64)
        self.x, self.label = self._fresh((batch, *shape))
        wanted = torch.arange(batch) * steps // batch
        for _ in range(int(wanted.max())):  # spread the trajectories over the steps
            _, _, _, target = self.look()
            self._move(target, self.place < wanted)

    def _fresh(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        noise = torch.randn(shape, generator=self.random)
        label = torch.randint(0, NUM_CLASSES, (shape[0],), generator=self.random)
        return noise.to(self.device), label.to(self.device)

    @torch.no_grad()
    def look(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The points with and without their class, and the dense velocity there.

        Returns:
            Points, times, labels and velocities of the batch twice over, ``[2 B, ...]``: first with the classes.
        """
        x = self.x.repeat(2, 1, 1, 1, 1)
        time = (1 - self.place / self.steps).to(self.device, torch.float32).repeat(2)
        label = torch.cat((self.label, torch.full_like(self.label, NULL_CLASS)))
        return x, time, label, self.velocity(x, time, label)

    def advance(self, velocity: Tensor) -> None:
        """One step of every trajectory by the guided velocity of ``look``; those at the end start anew."""
        self._move(velocity, torch.ones_like(self.place, dtype=torch.bool))
        done = self.place == self.steps
        if bool(done.any()):
            noise, label = self._fresh((int(done.sum()), *self.x.shape[1:]))
            self.x[done.to(self.device)], self.label[done.to(self.device)] = noise, label
            self.place[done] = 0

    def _move(self, velocity: Tensor, which: Tensor) -> None:
        conditional, unconditional = velocity.chunk(2)
        guided = guide(conditional, unconditional, self.cfg_scale)
        moved = self.x - guided / self.steps
        self.x = torch.where(which.to(self.device).view(-1, 1, 1, 1, 1), moved, self.x)
        self.place = self.place + which


def adapt(
    teacher: DigitsTransformer,
    config: RunConfig,
    path: Path,
    *,
    updates: int,
    steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Train the sparse teacher and write its averaged weights; nothing is written before the end.

    Args:
        teacher: dense.
        config: of the run that will distil it: sparsity, batch, guidance, the student's optimizer, average, seed.
        path: safetensors, for ``model.weights``.
        updates: of the weights.
        steps: of the teacher's trajectories.
        progress: told after each update.

    Returns:
        The mean loss of the last tenth of the updates.

    Raises:
        DivergedError: the loss is not finite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense, sparse = deepcopy(teacher).to(device), deepcopy(teacher).to(device).requires_grad_(True)
    average = deepcopy(teacher).to(device)
    options = config.sparsity.options(grid=teacher.config.grid)
    run = torch.compile(sparse, backend="blade", options=options, dynamic=False)
    clip = (1, teacher.config.frames, teacher.config.size, teacher.config.size)
    walk = Walk(
        torch.compile(dense, dynamic=False),
        clip,
        config.loop.batch_size,
        steps=steps,
        cfg_scale=config.method.cfg_scale,
        seed=config.seed,
        device=device,
    )
    optimizer = torch.optim.AdamW(
        sparse.parameters(),
        config.optimizer.student.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
    )
    losses: list[float] = []
    for update in range(1, updates + 1):
        x, time, label, target = walk.look()
        loss = (run(x, time, label) - target).square().mean()
        losses.append(_step(optimizer, sparse, loss, config.optimizer.clip, update))
        walk.advance(target)
        _average(average, sparse, config.ema.decay, update)
        progress(update, updates)
    last = losses[-max(1, updates // 10) :]
    save_teacher(average.cpu(), path, _metadata(config, updates, steps))
    return sum(last) / len(last)


def _step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor, clip: float, update: int) -> float:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    value = float(loss.detach())
    if not value < float("inf"):
        raise DivergedError(f"the loss of the sparse teacher is {value} at update {update}; lower the learning rate")
    optimizer.step()
    return value


def _average(average: nn.Module, model: nn.Module, decay: float | None, update: int) -> None:
    """The weights' average, as short as the run is at its start; without a decay the weights themselves."""
    keep = min(decay, update / (update + 5)) if decay is not None else 0.0
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


def _metadata(config: RunConfig, updates: int, steps: int) -> dict[str, str]:
    made: dict[str, Any] = {"updates": updates, "steps": steps, "seed": config.seed}
    return {"adapted": json.dumps({**made, "sparsity": config.sparsity.model_dump(mode="json")})}
