"""Facts of the machine that a figure must be read with, and its free memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from ..report.paragraphs import number_of


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache() -> int:
    """Bytes of the last-level cache as the system reports it; 64 MiB if it does not."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=64 << 20)


def machine_facts() -> dict[str, Any]:
    """What a figure must be read with."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_mib": last_level_cache() >> 20,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def machine_line(facts: dict[str, Any]) -> str:
    """:func:`machine_facts` in a line."""
    gpu = f"{facts['gpu']}, " if facts["gpu"] else ""
    return (
        f"{gpu}{facts['cpu']} ({facts['cpu_capability']}), {number_of(facts['cores'], 'core')}, "
        f"{number_of(facts['threads'], 'thread')}, "
        f"last-level cache {facts['last_level_cache_mib']} MiB, torch {facts['torch']}, transformers "
        f"{facts['transformers']}, load average {facts['load_average']}"
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not (info := Path("/proc/meminfo")).exists():
        return None
    lines = (line.split() for line in info.read_text().splitlines())
    free = 1024 * next(int(line[1]) for line in lines if line[0] == "MemAvailable:")
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def _cpu_name() -> str:
    """Model name, with the numbers that tell generations apart where the name does not."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = (line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in lines}
    name = found.get("model name", platform.machine())
    return f"{name}, family {found['cpu family']} model {found['model']}" if "cpu family" in found else name


__all__ = ["available_cores", "free_memory", "last_level_cache", "machine_facts", "machine_line"]
