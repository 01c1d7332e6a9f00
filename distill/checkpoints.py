"""Checkpoints of a training: whole or absent, verified by hash, read by any number of ranks.

::

    checkpoints/
      step_00000050/
        shard-<rank>-model-<i>-of-<n>.safetensors    what that rank wrote: tensors, or parts of them with their offsets
        record.json                                  step, the caller's record, shape and dtype of every tensor
        manifest.json                                size and SHA-256 of every other file
      .partial-step_00000100/                        being written, or left by a killed process
      aside_step_00000200/                           of a run that was then resumed from an earlier step

A checkpoint is written into a hidden folder, brought to the disk file by file, and renamed, so wherever a writer is
killed the earlier ones stay what they were. Tensors go through torch.distributed.checkpoint and its safetensors
writer: no file holds a pickle, and a DTensor saved by n ranks is read by m. Tensors that aren't sharded have to be
equal on all ranks; each is written by one of them, so the folder has to be one that all ranks see.

Where torch.distributed is initialised, ``save``, ``load`` and ``choose`` are called by all ranks, and an error of one
is raised on all of them. Ranks tell each other plans and errors through torch.distributed, in memory.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from blade_compile.distill.checkpoint_files import (
    RECORD,
    begin,
    complete,
    difference,
    found,
    is_checkpoint,
    name_of,
    read_json,
    retire,
    seal,
)
from blade_compile.distill.errors import ConfigError, DataError

_FILE_BYTES = 2 << 30  # about what one file holds: the writer builds each in memory before it writes it

T = TypeVar("T")
_log = logging.getLogger(__name__)


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], *, keep_last: int) -> Path:
    """Write a checkpoint, then remove older ones.

    Checkpoints of later steps belong to a run that was left behind by resuming before them. They are set aside under
    another name, so that ``choose`` goes on with this run.

    Args:
        folder: of all checkpoints; made where it is missing. May be a link.
        step: its number. A checkpoint of the same step is replaced.
        tensors: the same names on every rank; DTensors may be sharded in any way.
        record: anything that JSON holds; the first rank's is written.
        keep_last: how many stay, this one included.

    Returns:
        ``folder / "step_<step>"``.

    Raises:
        DataError: it can't be written (full disk, no permission). Earlier checkpoints are as they were.
    """
    target = Path(folder) / name_of(step)
    partial = target.with_name(f".partial-{target.name}")
    state = {"step": step, "ranks": _world(), "record": record, "tensors": _kinds(tensors)}
    try:
        _on_first(lambda: begin(target.parent, partial))
        _write_tensors(partial, tensors)
        sealed = _on_all(lambda: {file.name: seal(file) for file in partial.glob(f"shard-{_rank() + 1:05d}-*")})
        files = {name: entry for of_rank in sealed for name, entry in of_rank.items()}
        _on_first(lambda: complete(partial, target, files, state))
    except OSError as error:
        _on_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise DataError(
            f"{target} can't be written: {error.strerror or error}; free space there or permit writing, then repeat "
            "the command: it goes on from the last whole checkpoint"
        ) from error
    _on_first(lambda: retire(target.parent, step, keep_last))
    return target


def load(path: Path, tensors: Mapping[str, Tensor], *, part: bool = False) -> dict[str, Any]:
    """Verify a checkpoint by its hashes and fill tensors from it, in place.

    Args:
        path: of one checkpoint.
        tensors: as given to ``save``; DTensors may be sharded otherwise, or over another number of ranks.
        part: the checkpoint may hold other tensors beside these, which aren't read.

    Returns:
        The record, and ``"step"``.

    Raises:
        ConfigError: it is no checkpoint, or its tensors have other names, shapes or dtypes.
        DataError: it is damaged.
    """
    path = Path(path)
    _verify(path)
    state = _on_all(lambda: _fitting_state(path, tensors, part))[0]
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = HuggingFaceStorageReader(str(path))
    with _plain_errors():
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
    return _record(state)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a checkpoint, and ``"step"``. Tensors are neither read nor verified; ranks may call it alone.

    Raises:
        ConfigError: it is no checkpoint.
        DataError: its record or manifest is damaged.
    """
    path = Path(path)
    _check_is_checkpoint(path)
    _refuse(path, difference(path, only=RECORD))
    return _record(read_json(path / RECORD))


def choose(folder: Path, resume: str) -> Path | None:
    """Which checkpoint to go on from.

    Args:
        folder: of all checkpoints.
        resume: "auto": the newest whole one, with a warning for each damaged one that is newer; "never": none; else
            the path of one.

    Returns:
        Its path, or None: start anew.

    Raises:
        ConfigError: the path is no checkpoint.
        DataError: the checkpoint there is damaged; for "auto": there are some and all of them are.
    """
    if resume == "never":
        return None
    if resume != "auto":
        _verify(Path(resume))
        return Path(resume)
    try:
        candidates = _on_first(lambda: found(Path(folder)))
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error.strerror or error}; permit reading it") from error
    for _, path in candidates:
        damage = _damage(path)
        if damage is None:
            return path
        if _rank() == 0:
            _log.warning("%s is damaged and skipped: %s", path, damage)
    if candidates:
        raise DataError(f"{folder} holds {len(candidates)} checkpoints, none whole; restore one or give resume=never")
    return None


# Ranks


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _on_all(work: Callable[[], T]) -> list[T]:
    """What the work gives on every rank; what it raises on one is raised on all, so that none waits for ever."""
    mine: tuple[T | None, Exception | None]
    try:
        mine = work(), None
    except Exception as error:  # noqa: BLE001 - told to all ranks and raised below
        mine = None, error
    everywhere: list[Any] = [mine] * _world()
    if _world() > 1:
        dist.all_gather_object(everywhere, mine)
    for _, failure in everywhere:
        if failure is not None:
            raise failure
    return [result for result, _ in everywhere]


def _on_first(work: Callable[[], T]) -> T:
    """What the work gives on the first rank, which alone does it."""
    results: list[Any] = _on_all(lambda: work() if _rank() == 0 else None)
    return results[0]  # type: ignore[no-any-return]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what went wrong in torch.distributed.checkpoint itself, and let it work without a process group."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        causes = [cause for cause, _ in failure.failures.values()]
        raise next((cause for cause in causes if not isinstance(cause, Exception)), causes[0]) from failure


# Writing


def _write_tensors(partial: Path, tensors: Mapping[str, Tensor]) -> None:
    storable = _storable(tensors)
    writer = HuggingFaceStorageWriter(str(partial), _file_of(storable), save_distributed=True)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _plain_errors():
        dcp.save(storable, storage_writer=writer, planner=planner, no_dist=not dist.is_initialized())


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copies of those that safetensors refuses: not contiguous, or in the same memory as another one."""
    out: dict[str, Any] = {}
    seen = set()
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_contiguous() and local.data_ptr() not in seen:
            out[name] = tensor
            seen.add(local.data_ptr())
            continue
        copied = local.detach().clone(memory_format=torch.contiguous_format)
        out[name] = _with_local(tensor, copied) if isinstance(tensor, DTensor) else copied
    return out


def _with_local(tensor: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _file_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which of a rank's files each tensor goes to, from 1, so that none becomes much larger than ``_FILE_BYTES``."""
    index, filled, out = 1, 0, {}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() // _world()
        if filled and filled + size > _FILE_BYTES:
            index, filled = index + 1, 0
        filled += size
        out[name] = index
    return out


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What has to be the same when they are read: shapes and dtypes."""
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }


# Reading


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks; each reads its share of the files."""
    share = slice(_rank(), None, _world())
    return next((damage for damage in _on_all(lambda: difference(path, share=share)) if damage), None)


def _verify(path: Path) -> None:
    _on_all(lambda: _check_is_checkpoint(path))
    _refuse(path, _damage(path))


def _refuse(path: Path, damage: str | None) -> None:
    if damage is not None:
        raise DataError(
            f"{path} is damaged: {damage}; give another checkpoint, or resume=auto for the newest whole one"
        )


def _check_is_checkpoint(path: Path) -> None:
    if not is_checkpoint(path):
        inside = ", ".join(inner.name for _, inner in found(path))
        raise ConfigError(f"{path} is no checkpoint; give {f'one that it holds: {inside}' if inside else 'its folder'}")


def _record(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state["record"], "step": state["step"]}


def _fitting_state(path: Path, tensors: Mapping[str, Tensor], part: bool) -> dict[str, Any]:
    """The content of ``record.json``, once the tensors are found to be those, or a part of those, that it lists."""
    state = read_json(path / RECORD)
    stored, wanted = state["tensors"], _kinds(tensors)
    for name in wanted if part else [*wanted, *stored]:
        if stored.get(name) != wanted.get(name):
            has, needs = (_words(kinds.get(name)) for kinds in (stored, wanted))
            raise ConfigError(
                f"{path} doesn't fit this run: of {name!r} it has {has}, the run {needs}; resume with the "
                "configuration that wrote it, or resume=never"
            )
    return state


def _words(kind: Mapping[str, Any] | None) -> str:
    return "nothing" if kind is None else f"{kind['dtype']} {kind['shape']}"
