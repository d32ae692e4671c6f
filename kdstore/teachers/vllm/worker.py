"""What vLLM adds to each of its workers: the methods that ``collective_rpc`` calls by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdstore.teachers.vllm.cpu_seeds import rewind_generators
from kdstore.teachers.vllm.hooks import install


class TapExtension:
    """``worker_extension_cls`` of an engine; vLLM makes it a base class of its worker."""

    model_runner: Any
    is_driver_worker: bool  # the first rank of its pipeline stage

    def kdstore_install(self, vocab_size: int) -> str:
        """Install the tap on the worker's model runner; which runner that is."""
        self.kdstore_tap, name = install(
            self.model_runner, vocab_size=vocab_size, answers=self.is_driver_worker
        )
        if name == "v1" and self.model_runner.device.type == "cpu":
            rewind_generators(self.model_runner)
        return name

    def kdstore_take(self, keys: Sequence[int]) -> bytes:
        """The answers of some requests; see ``Tap.take``."""
        return self.kdstore_tap.take(keys)
