"""The one place that retries: reads of remote file systems, and requests to servers."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

ATTEMPTS = 6
MAX_TOTAL_S = 60
_FIRST_WAIT_S, _MAX_WAIT_S = 0.1, 5
_LASTING = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError),
    *(ImportError, NotImplementedError, TypeError, ValueError),
)
_LASTING_NUMBERS = (errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENAMETOOLONG, errno.ENOSYS)
REQUEST_ATTEMPTS = 8
REQUEST_FIRST_WAIT_S, REQUEST_MAX_WAIT_S = 0.5, 30.0
T = TypeVar("T")
E = TypeVar("E", bound=Exception)


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


async def retrying_requests(
    ask: Callable[[], Awaitable[T]],
    *,
    busy: type[E],
    asked_wait_s: Callable[[E], float],
    attempts: int = REQUEST_ATTEMPTS,
) -> T:
    """What ``ask`` gives, asked again after a ``busy`` error; the last one is raised.

    Before that it waits ``asked_wait_s`` of the error, which the server said, and a random time up
    to one that doubles.
    """
    from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
    from tenacity import wait_random_exponential as random_wait

    jitter = random_wait(multiplier=REQUEST_FIRST_WAIT_S, max=REQUEST_MAX_WAIT_S)

    def wait_s(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return jitter(state) + (asked_wait_s(error) if isinstance(error, busy) else 0.0)

    policy = AsyncRetrying(
        stop=stop_after_attempt(attempts),
        wait=wait_s,
        retry=retry_if_exception_type(busy),
        reraise=True,
    )

    async def once() -> T:
        return await ask()

    return await policy(once)  # which awaits what a coroutine function gives, and no other


def may_pass(error: BaseException) -> bool:
    """Whether a failure may be gone the next time: not what is missing, forbidden or misused."""
    if not isinstance(error, Exception) or isinstance(error, _LASTING):
        return False
    if isinstance(error, OSError) and error.errno in _LASTING_NUMBERS:
        return False
    # botocore's errors have no common base that tells these apart.
    return "Credential" not in type(error).__name__
