"""The limit of open files of this process, raised as far as the system allows."""

from __future__ import annotations

import resource
from contextlib import suppress

TARGET_FILES = 65_536


def raise_limit() -> int:
    """Allow as many open files as the system does, up to `TARGET_FILES`; how many may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = TARGET_FILES if hard == resource.RLIM_INFINITY else min(TARGET_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            soft = target
    return TARGET_FILES if soft == resource.RLIM_INFINITY else soft
