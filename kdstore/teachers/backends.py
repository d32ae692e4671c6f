"""The kinds of teachers, by the name that ``--backend`` gives them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from kdstore.errors import UsageError

if TYPE_CHECKING:
    from kdstore.teacher import Teacher
    from kdstore.teachers.hf_load import CheckpointInfo
    from kdstore.teachers.scoring import ScoringOptions
    from kdstore.writers.dump import DumpConfig


class Backend(Protocol):
    """A teacher that is described, and not loaded yet."""

    info: CheckpointInfo

    def config(self) -> DumpConfig:
        """What is stored; UsageError or TeacherError for what this kind cannot give."""
        ...

    def load(self, *, num_ids: int) -> Teacher:
        """The teacher, ready to score; ``num_ids`` is how many ids its tokenizer has."""
        ...


# name -> module and class; the class takes ScoringOptions
BACKENDS = {
    "hf": ("kdstore.teachers.hf_backend", "HFBackend"),
    "vllm": ("kdstore.teachers.vllm.backend", "VLLMBackend"),
    "openai": ("kdstore.teachers.openai_backend", "OpenAIBackend"),
}


def open_backend(options: ScoringOptions) -> Backend:
    """The described teacher of some options; UsageError for a name that no backend has."""
    if options.backend not in BACKENDS:
        raise UsageError(
            f"unknown backend {options.backend!r}",
            where="backend",
            expected=", ".join(BACKENDS),
            got=options.backend,
        )
    if options.server is not None and options.backend != "openai":
        raise UsageError(
            "only the backend openai asks a server", where="backend", got=options.backend
        )
    module, name = BACKENDS[options.backend]
    backend: Backend = getattr(import_module(module), name)(options)
    return backend
