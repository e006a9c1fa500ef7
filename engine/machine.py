"""What the machine has: cores that this process may use, memory."""

from __future__ import annotations

import os
from pathlib import Path

from cpmbee.control_groups import cpu_quota, memory_limit

_FALLBACK_MEMORY = 4 << 30


def physical_cores() -> int:
    """Physical cores that this process may use all the time, at least 1.

    Counted are those that it may run on, hyper-threads of one core once, and no more than its control groups' quota of
    processor time (``docker --cpus``, a limit of Kubernetes) keeps busy: 1 core of a quota of 1.5. A thread more would
    stand still for a part of every period, and the others with it, since they wait for one another.
    """
    cores = _cores_by_affinity()
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its control groups' if that is less."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = _FALLBACK_MEMORY
    limit = memory_limit()
    return memory if limit is None else min(memory, limit)


def _cores_by_affinity() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)
