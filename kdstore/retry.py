"""The one place that retries: reads of remote file systems that may work the next time."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

ATTEMPTS = 6
MAX_TOTAL_S = 60
_FIRST_WAIT_S, _MAX_WAIT_S = 0.1, 5
_LASTING = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError),
    *(ImportError, NotImplementedError, TypeError, ValueError),
)
_LASTING_NUMBERS = (errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENAMETOOLONG, errno.ENOSYS)
T = TypeVar("T")


def retrying(ask: Callable[[], T]) -> T:
    """What ``ask`` gives, asked again after failures that may pass; the last one is raised.

    At most ``ATTEMPTS`` times, and not again after ``MAX_TOTAL_S``. The waits double and are drawn
    at random, so that many readers of a busy server do not come back together.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay
    from tenacity import wait_random_exponential as random_wait

    attempts = Retrying(
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(MAX_TOTAL_S),
        wait=random_wait(multiplier=_FIRST_WAIT_S, max=_MAX_WAIT_S),
        retry=retry_if_exception(may_pass),
        reraise=True,
    )
    return attempts(ask)


def may_pass(error: BaseException) -> bool:
    """Whether a failure may be gone the next time: not what is missing, forbidden or misused."""
    if not isinstance(error, Exception) or isinstance(error, _LASTING):
        return False
    if isinstance(error, OSError) and error.errno in _LASTING_NUMBERS:
        return False
    # botocore's errors have no common base that tells these apart.
    return "Credential" not in type(error).__name__
