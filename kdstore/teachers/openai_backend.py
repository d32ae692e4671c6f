"""The ``openai`` backend: finds out what a server serves, and how it gives logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kdstore.errors import TeacherError, UsageError
from kdstore.select import parse_selection
from kdstore.select.topk import TopK
from kdstore.teachers.hf_load import describe_checkpoint
from kdstore.teachers.openai import OpenAITeacher, Served, refuse_full_logits
from kdstore.teachers.openai_answers import FLAVOURS
from kdstore.teachers.openai_client import Session, open_session
from kdstore.teachers.openai_options import ServerOptions
from kdstore.teachers.scoring import ScoringOptions
from kdstore.writers.dump import DumpConfig

_ATTEMPTS = 3  # a server that is not there is more often a wrong URL than a busy server


class OpenAIBackend:
    """A model behind a server; the teacher's folder needs its tokenizer and config.json only."""

    def __init__(self, options: ScoringOptions) -> None:
        self._options = options
        _refuse_full_logits(options)
        if options.server is None:
            raise UsageError(
                "the backend openai asks a server", expected="--server http://host:8000/v1"
            )
        info = describe_checkpoint(options.path, dtype=options.dtype, device="cpu")
        dtype = "server" if options.dtype == "auto" else info.dtype
        self._served, server_length = find_model(options.server)
        lengths = [length for length in (info.max_length, server_length) if length]
        self.info = replace(info, dtype=dtype, max_length=min(lengths, default=None))

    def config(self) -> DumpConfig:
        """What the options ask for, with the scalars that the server can give."""
        return replace(self._options.dump_config, scalars=self._served.flavour.scalars)

    def load(self, *, num_ids: int) -> OpenAITeacher:
        """Nothing is loaded here."""
        return OpenAITeacher(self.info, self._served, num_ids=num_ids)


def find_model(options: ServerOptions) -> tuple[Served, int | None]:
    """The model that the options mean, and the longest prompt it takes, if the server says so.

    Raises TeacherError for a server that is not there, UsageError if a model or flavour must be
    named.
    """
    with open_session(options) as session:
        cards = session.ask(
            "/v1/models", read=_model_cards, where=options.url, attempts=_ATTEMPTS
        ).result()
        card = _chosen(cards, options)
        name = options.flavour or str(card.get("owned_by"))
        if name not in FLAVOURS:
            raise UsageError(
                "it is not known how this server gives logprobs of prompts",
                where=options.url,
                expected=f"--flavour {' or '.join(FLAVOURS)}",
                got=f"a model owned by {name!r}",
            )
        flavour = FLAVOURS[name]
        version = _version(session, flavour.version_path)
    length = card.get("max_model_len")  # one token of it must be left to generate
    served = Served(options=options, flavour=flavour, model=str(card["id"]), version=version)
    return served, length - 1 if isinstance(length, int) else None


def _refuse_full_logits(options: ScoringOptions) -> None:
    selection = parse_selection(options.select)
    wanted = {
        f"--select {selection.spec}": not isinstance(selection, TopK),
        "--audit-fraction": options.audit_fraction > 0,
        "--temperatures": bool(options.temperatures),
    }
    refuse_full_logits(wanted, expected="--select topk:k=…, without audits and temperatures")


def _model_cards(answer: Any) -> Sequence[dict[str, Any]]:
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list) or not all(isinstance(c, dict) and "id" in c for c in cards):
        raise TeacherError("the server lists no models", where="/v1/models", got=str(answer)[:200])
    return cards


def _chosen(cards: Sequence[dict[str, Any]], options: ServerOptions) -> dict[str, Any]:
    """The card of the named model, or the only one."""
    named = [card for card in cards if options.model in (None, card["id"])]
    if len(named) == 1:
        return named[0]
    raise UsageError(
        "the server has no such model" if options.model else "the server has several models",
        where=options.url,
        expected=f"--model, one of {', '.join(str(card['id']) for card in cards)}",
        got=options.model,
    )


def _version(session: Session, path: str) -> str | None:
    """What the server says its version is; None if it does not, since scores do not need it."""

    def read(answer: Any) -> str | None:
        return str(answer["version"]) if isinstance(answer, dict) and "version" in answer else None

    try:
        return session.ask(path, read=read, where=path, attempts=1).result()
    except TeacherError:
        return None
