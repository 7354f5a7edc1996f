"""A disk that is full: the limit on the size of a file lets a write fail half way, too."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def file_size_limit(size: int, pid: int = 0) -> Iterator[None]:
    """Let writing beyond ``size`` bytes of a file fail, in this process or in ``pid``."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
