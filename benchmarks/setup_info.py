"""What a measurement was made on: a figure without this line means nothing."""

from __future__ import annotations

import datetime as dt
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from blade_compile.kernels import cpu_build

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "diffusers")


def collect() -> dict[str, str]:
    """Processor, instruction set, cores, threads, GPU, versions, commit and date."""
    return {
        "cpu": cpu_name(),
        "isa": cpu_build.loaded_isa() or "none (ATen)",
        "cores": str(usable_cores()),
        "threads": str(torch.get_num_threads()),
        "load": _load(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "compiler": _compiler(),
        "commit": _commit(),
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
    }


def lines(info: dict[str, str]) -> list[str]:
    """The setup as the first lines of a report."""
    versions = ", ".join(f"{name} {info[name]}" for name in PACKAGES)
    gpu = f", GPU {info['gpu']}" if info["gpu"] != "none" else ""
    return [
        f"{info['cpu']} ({info['isa']}), {info['threads']} of {info['cores']} cores, load before {info['load']}{gpu}",
        f"{versions}, Python {info['python']}, {info['compiler']}",
        f"commit {info['commit']}, {info['date']}",
    ]


def stamp(device: torch.device) -> dict[str, str]:
    """What stands in every row: device, its clocks now, driver, versions, commit and time."""
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    if device.type == "cuda":
        name, (clocks, driver) = torch.cuda.get_device_name(device), _gpu_clocks(driver_id(device.index or 0))
    else:
        name, clocks, driver = cpu_name(), _cpu_clocks(), f"none ({platform.system()} {platform.release()})"
    return {
        "device": name,
        "clocks": clocks,
        "driver": driver,
        "versions": f"{versions}, Python {platform.python_version()}",
        "commit": _commit(),
        "time": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }


def driver_id(index: int) -> str:
    """What nvidia-smi calls PyTorch's device: it numbers all of them, PyTorch those of CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is not None:
        return f"GPU-{uuid}"
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[index] if index < len(visible) else str(index)


def _gpu_clocks(device: str) -> tuple[str, str]:
    """Clocks of the multiprocessors and the memory, and the driver's version, as the driver says now."""
    query = "--query-gpu=clocks.sm,clocks.mem,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={device}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        multiprocessors, memory, driver = done.stdout.strip().split(", ")
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown", "unknown"
    return f"multiprocessors {multiprocessors}, memory {memory}", driver


def _cpu_clocks() -> str:
    """The cores' lowest and highest clock now; a virtual machine may tell its nominal one."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = [float(line.partition(":")[2]) for line in text.splitlines() if line.startswith("cpu MHz")]
    return f"{min(found):.0f} to {max(found):.0f} MHz" if found else "unknown"


@functools.cache
def cpu_name() -> str:
    """The processor as it names itself, with family and model: cloud machines hide the rest."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" family {fields['cpu family']} model {fields.get('model', '?')}"
    return name


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> str:
    """The one-minute load average: above one before a run starts, the machine was not quiet."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _compiler() -> str:
    try:
        command = cpu_build._find_compiler()
    except cpu_build.BuildError:
        return "no C++ compiler"
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown compiler"])[0]


@functools.cache
def _commit() -> str:
    """Short hash of the checkout, with ``+`` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
