"""What Linux control groups allow this process: the share of the processors and of the memory that a container has.

A process is in one group of each hierarchy, and the limits of all groups above hold for it, too. The kernel says in
``/proc/self/cgroup`` which groups those are and in ``/proc/self/mountinfo`` where they can be read: of version 2 there
is one hierarchy, of version 1 one for each kind of limit, and inside a container only the container's part may be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
# A line of mountinfo: numbers, the part of the hierarchy that is mounted, where, options, version, source, controllers.
_MOUNT = re.compile(r"\S+ \S+ \S+ (?P<top>\S+) (?P<point>\S+) .*- cgroup(?P<version>2?) \S+ (?P<options>\S+)")


def cpu_quota(root: Path = _ROOT) -> float | None:
    """How many processors' time the process may take, such as 1.5; None without a limit.

    Args:
        root: of the file system that is read.
    """
    quotas = []
    for group in _groups("cpu", root):
        with suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas.append(int(quota) / int(period))
    return min((quota for quota in quotas if quota > 0), default=None)  # -1 is version 1's word for no limit


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes of memory that the process may take together with the others of its group; None without a limit.

    Args:
        root: of the file system that is read.
    """
    limits = []
    for group in _groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                limits.append(int((group / name).read_text()))
    return min(limits, default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the groups whose limits hold: the process's own one and all above it that can be seen."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, ValueError):
        return
    paths: dict[str, str] = {}  # by controller, the group's path in its hierarchy; version 2 names none
    for line in memberships:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in mounts:
        if mount := _MOUNT.fullmatch(line):
            named = controller if mount["version"] == "" else ""
            if named in paths and (not named or named in mount["options"].split(",")):
                folder = root / _unescaped(mount["point"]).lstrip("/")
                yield folder
                for part in _below(paths[named], _unescaped(mount["top"])):
                    folder /= part
                    yield folder


def _below(path: str, top: str) -> list[str]:
    """The parts of a group's path below the group that is mounted; none where it is not below it."""
    parts, above = ([part for part in each.split("/") if part] for each in (path, top))
    if parts[: len(above)] != above or ".." in parts:
        return []
    return parts[len(above) :]


def _unescaped(text: str) -> str:
    """A path as it is; the kernel writes blanks and the like as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
