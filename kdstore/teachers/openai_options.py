"""Where a server of the ``openai`` backend is, and how it may be asked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from kdstore.errors import UsageError

DEFAULT_KEY_ENV = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """An OpenAI-compatible server; the key itself is never part of it.

    * ``url``: such as ``http://host:8000/v1``
    * ``model``: the name it serves the teacher by; None: the only one that it lists
    * ``flavour``: how it gives logprobs of prompts; None: what it says it is
    * ``api_key_env``: the environment variable that holds the key, if it asks for one
    * ``concurrency``: requests in flight at most
    * ``requests_per_minute``: requests sent at most, those that are tried again included
    * ``timeout_s``: how long it may stay silent before a request is tried again
    """

    url: str
    model: str | None = None
    flavour: Literal["vllm", "sglang"] | None = None
    api_key_env: str = DEFAULT_KEY_ENV
    concurrency: int = 32
    requests_per_minute: float | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UsageError(
                "no URL of a server",
                where="server",
                expected="http://host:8000/v1, without a user or key in it",
                got=self.url if not parts.username else "a URL with a user",
            )
        for name in ("concurrency", "requests_per_minute", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError("too little", where=f"server.{name}", expected="> 0", got=value)

    @property
    def root(self) -> str:
        """The URL without ``/v1``, which the paths of requests have."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def api_key(self) -> str | None:
        """The key; UsageError if a variable was named that is not set."""
        key = os.environ.get(self.api_key_env)
        if not key and self.api_key_env != DEFAULT_KEY_ENV:
            raise UsageError(
                "the variable that should hold the key is not set",
                where="server.api_key_env",
                got=self.api_key_env,
            )
        return key or None
