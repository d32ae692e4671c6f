"""Requests to a server: kept to a rate, tried again, and cancelled when nobody waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from kdstore.errors import MissingDependencyError, TeacherError
from kdstore.retry import REQUEST_ATTEMPTS, retrying_requests
from kdstore.teachers.openai_options import ServerOptions

if TYPE_CHECKING:
    import httpx2
    from anyio.from_thread import BlockingPortal

MAX_ASKED_WAIT_S = 600.0
_CONNECT_S = 10.0
_BUSY = (408, 409, 425, 429)
_MESSAGE_CHARS = 500
T = TypeVar("T")


class BusyError(TeacherError):
    """A request that may work later: after ``wait_s`` at the earliest, if the server says so."""

    def __init__(self, what: str, *, wait_s: float = 0.0, **parts: Any) -> None:
        super().__init__(what, **parts)
        self.wait_s = wait_s


class Session:
    """Requests in flight to one server, on an event loop in a thread of its own."""

    def __init__(
        self, client: httpx2.AsyncClient, portal: BlockingPortal, options: ServerOptions
    ) -> None:
        self._client, self._portal, self._options = client, portal, options
        self._next_s = 0.0

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        read: Callable[[Any], T],
        where: str,
        attempts: int = REQUEST_ATTEMPTS,
    ) -> Future[T]:
        """What ``read`` makes of the JSON that the server answers to a GET, or a POST of ``body``.

        It runs on the loop, so that only one answer at a time is held as Python objects. Raises
        TeacherError for a refusal, for no answer after all attempts and for what is no JSON.
        """

        async def answer() -> T:
            found = await retrying_requests(
                lambda: self._once(path, body, where=where),
                busy=BusyError,
                asked_wait_s=lambda error: error.wait_s,
                attempts=attempts,
            )
            return read(found)

        return self._portal.start_task_soon(answer)

    async def _once(self, path: str, body: dict[str, Any] | None, *, where: str) -> Any:
        import httpx2

        await self._turn()
        try:
            response = await self._client.request("POST" if body else "GET", path, json=body)
        except httpx2.TransportError as error:
            got = f"{type(error).__name__}: {error}"
            raise BusyError("the server does not answer", where=where, got=got) from error
        if response.status_code in _BUSY or response.status_code >= 500:
            wait_s = asked_wait_s(response.headers.get("retry-after"))
            got = self._message(response)
            raise BusyError("the server cannot answer now", where=where, got=got, wait_s=wait_s)
        if not response.is_success:
            got = self._message(response)
            todo = self._todo(response.status_code, got)
            raise TeacherError("the server refuses a request", where=where, got=got, todo=todo)
        try:
            return response.json()
        except ValueError as error:
            got = self._message(response)
            raise TeacherError("the server's answer is no JSON", where=where, got=got) from error

    async def _turn(self) -> None:
        """Waits until the rate lets another request be sent."""
        if self._options.requests_per_minute is None:
            return
        now_s = time.monotonic()
        sent_s = max(now_s, self._next_s)
        self._next_s = sent_s + 60 / self._options.requests_per_minute
        await asyncio.sleep(sent_s - now_s)

    def _message(self, response: httpx2.Response) -> str:
        """Path, status and the first words of an answer. Some servers repeat the key: not here."""
        text = response.text.strip()
        if self._options.api_key:
            text = text.replace(self._options.api_key, "…")
        return f"{response.url.path}: {response.status_code} {text[:_MESSAGE_CHARS]}"

    def _todo(self, status: int, message: str) -> str | None:
        if status in (401, 403):
            return f"set the key in the environment variable {self._options.api_key_env}"
        if "logprobs" in message and "max allowed" in message:
            return "start the server with a larger --max-logprobs, or select a smaller k"
        if status in (404, 405):
            return "score with a server of /v1/completions (vLLM) or /generate (SGLang)"
        return None


@contextmanager
def open_session(options: ServerOptions) -> Iterator[Session]:
    """A session; what is in flight is cancelled when it is left with an error.

    Raises MissingDependencyError without httpx2.
    """
    try:
        import httpx2
        from anyio.from_thread import start_blocking_portal
    except ImportError as error:
        raise MissingDependencyError(
            "the backend openai needs httpx2", where="backend", todo="pip install kdstore[openai]"
        ) from error
    key = options.api_key
    with start_blocking_portal() as portal:
        client = httpx2.AsyncClient(
            base_url=options.root,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(options.timeout_s, connect=_CONNECT_S, pool=None),
            limits=httpx2.Limits(max_connections=options.concurrency),
        )
        with portal.wrap_async_context_manager(client) as entered:
            yield Session(entered, portal, options)


def asked_wait_s(text: str | None) -> float:
    """Seconds of a Retry-After header, which has them or a date; 0 for none, 10 minutes at most."""
    if text is None:
        return 0.0
    try:
        wait_s = float(text)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(wait_s, 0.0), MAX_ASKED_WAIT_S)
