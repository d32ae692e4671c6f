"""The ``hf`` backend: describes a checkpoint and loads it with transformers."""

from __future__ import annotations

from kdstore.teachers.hf import HFTeacher
from kdstore.teachers.hf_load import check_device, default_device, describe_checkpoint
from kdstore.teachers.scoring import ScoringOptions
from kdstore.writers.dump import DumpConfig


class HFBackend:
    """A transformers checkpoint that is scored in this process."""

    def __init__(self, options: ScoringOptions) -> None:
        self._options = options
        self._device = check_device(options.device or default_device())
        self.info = describe_checkpoint(options.path, dtype=options.dtype, device=self._device)

    def config(self) -> DumpConfig:
        """Whatever the options ask for: full logits are at hand."""
        return self._options.dump_config

    def load(self, *, num_ids: int) -> HFTeacher:
        """The model on its device."""
        return HFTeacher(
            self.info,
            device=self._device,
            batch_tokens=self._options.batch_tokens,
            num_ids=num_ids,
        )
