"""How often this process was forked, counted from its first ancestor that knew this module.

What was made before a fork can tell that it is in the child: threads do not survive there, and locks that they held
stay locked.
"""

from __future__ import annotations

import ctypes
import os
import weakref

_count = 0
_kept: weakref.WeakSet[object] = weakref.WeakSet()


def fork_count() -> int:
    """A number that is another one in every child than in its parent."""
    return _count


def keep_in_children(thing: object) -> None:
    """Never destroy a thing in a child, not even at its exit: its threads do not exist there and cannot be joined."""
    _kept.add(thing)


def _count_fork() -> None:
    global _count
    _count += 1
    for thing in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)
