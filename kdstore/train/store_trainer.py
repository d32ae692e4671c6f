"""StoreTrainer: `transformers.Trainer` on the batches of stores, which goes on where it stopped.

Trainer counts on epochs of one length, known beforehand, and goes on by drawing again what has been
seen. Batches of stores come from a loader: epochs end where it says, and a run goes on from its
state.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from kdstore.errors import UsageError
from kdstore.readers.collate import Collator
from kdstore.train.checkpoint import (
    STATE_FILE,
    TrainingState,
    last_checkpoint,
    new_session,
    read_state,
    reopen,
    rotate,
    write_state,
)
from kdstore.train.data import EpochEnds, Feed, is_loaded, loader_options

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch


class StoreTrainer(Trainer):  # type: ignore[misc]
    """Trains on a Store, Concatenation, Join, Mixture or OnlineSamples; or, as Trainer, on a list.

    * ``loader``: options of `kdstore.readers.loader.Loader`; see ``loader_options``
    * ``data_collator``: makes batches of a list of samples; by default a `kdstore.Collator`

    A checkpoint counts once its last file is written, and older ones are removed only then.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        loader: Mapping[str, Any] | None = None,
        data_collator: Any = None,
        callbacks: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_batches(args, train_dataset, loader, data_collator)
        self._loader_options = dict(loader or {})
        self._feed: Feed | None = None
        self._resumed: TrainingState | None = None
        self._session = 0
        self._epoch_ends = EpochEnds()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator or Collator(),
            callbacks=[self._epoch_ends, *(callbacks or ())],
            **kwargs,
        )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from a checkpoint if one is named, or the last complete one if True.

        Raises UsageError or StoreMismatchError if there is none, or one of other data or options.
        """
        checkpoint = self._checkpoint_of(resume_from_checkpoint)
        self._resumed = None if checkpoint is None else read_state(checkpoint)
        if checkpoint is not None:
            _check_resumable(self._resumed, checkpoint, on_store=is_loaded(self.train_dataset))
        self._session = new_session(self.args.output_dir)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            if self._feed is not None:
                self._feed.close()

    def _checkpoint_of(self, wanted: str | bool | None) -> str | None:
        if wanted is not True:
            return wanted or None
        found = last_checkpoint(self.args.output_dir)
        if found is None:
            raise UsageError(
                "nothing to resume",
                where=self.args.output_dir,
                expected="a complete checkpoint",
                got="none",
                todo="start anew, or set save_steps in the run to be resumed",
            )
        return str(found)

    def get_train_dataloader(self) -> Any:
        """The feed of a store, which deals batches to ranks itself; of a list the parent's."""
        self._feed = self._epoch_ends.feed = None
        if not is_loaded(self.train_dataset):
            return super().get_train_dataloader()
        given = self._loader_options
        options = loader_options(self.args, given, batch_size=self._train_batch_size)
        # Ranks of one tensor-parallel group read the same.
        options["rank"] = self.accelerator.process_index // self.get_tp_size()
        options["world_size"] = self._data_ranks()
        state = None if self._resumed is None else self._resumed.loader
        self._feed = self._epoch_ends.feed = Feed(self.train_dataset, options, state)
        return self._feed

    def _data_ranks(self) -> int:
        return int(self.accelerator.num_processes // self.get_tp_size())

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """How long to train: epochs of a feed are counted, but not where max_steps is set."""
        if self._feed is None:
            return super().set_initial_training_values(args, dataloader)
        steps, epochs = args.max_steps, sys.maxsize
        if steps <= 0:
            taken = 0 if self._resumed is None else self._resumed.step
            steps = taken + self._feed.steps_until(args.num_train_epochs)
            epochs = math.ceil(args.num_train_epochs)
        steps_an_epoch = max(steps, 1)  # too many: EpochEnds says when one is over
        batches_an_epoch = steps_an_epoch * args.gradient_accumulation_steps
        a_step = self.get_total_train_batch_size(args)
        return (
            epochs,
            steps_an_epoch,
            len(self.train_dataset),
            steps * a_step,
            a_step,
            batches_an_epoch,
            steps,
        )

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The epoch to go on in, and how many of its batches to skip: a feed begins behind them."""
        epoch, skipped = super()._init_training_state(max_steps, *args, **kwargs)
        if self._feed is None:
            return epoch, skipped
        is_done = self.state.global_step >= max_steps
        return (sys.maxsize if is_done else self._feed.state["epoch"]), 0

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a micro-batch, after its backward pass."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self._feed is not None:
            self._feed.trained_on(inputs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Correct the speed at the end of training, for which Trainer takes batches of one size."""
        if self._feed is not None and "train_samples_per_second" in logs:
            speed = self._feed.samples_done / logs["train_runtime"]
            logs["train_samples_per_second"] = round(speed, 3)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save all that Trainer saves, then what makes it complete, then remove older ones."""
        run = Path(self._get_output_dir(trial))
        checkpoint = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            reopen(checkpoint)
        self.accelerator.wait_for_everyone()
        with self._no_rotation():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if not self.args.save_only_model:  # else nothing can go on from it
                write_state(checkpoint, self._training_state())
            best = self.state.best_model_checkpoint
            keep = [checkpoint] if best is None else [checkpoint, best]
            rotate(run, limit=self.args.save_total_limit, keep=keep)

    def _training_state(self) -> TrainingState:
        loader = None if self._feed is None else self._feed.state
        return TrainingState(step=self.state.global_step, session=self._session, loader=loader)

    @contextmanager
    def _no_rotation(self) -> Iterator[None]:
        """Trainer would remove the last complete checkpoint before the new one is."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit


def _check_batches(args: TrainingArguments, dataset: Any, loader: Any, collator: Any) -> None:
    """UsageError for what would be ignored in silence."""
    if is_loaded(dataset):
        loader_options(args, loader or {}, batch_size=args.per_device_train_batch_size)
        if collator is not None:
            raise UsageError(
                "data_collator would never be called",
                where="DistillTrainer",
                got=collator,
                todo='leave it out; options such as "pack" and "pad_id" go into loader={…}',
            )
    elif loader is not None:
        raise UsageError(
            "loader is of no use here",
            where="DistillTrainer",
            expected="a Store, Concatenation, Join, Mixture or OnlineSamples",
            got=type(dataset).__name__,
            todo="set data_collator and per_device_train_batch_size",
        )


def _check_resumable(state: TrainingState | None, checkpoint: str, *, on_store: bool) -> None:
    """UsageError unless the checkpoint says where the data of a store was, or need not."""
    of_store = state is not None and state.loader is not None
    if of_store != on_store:
        raise UsageError(
            "this checkpoint does not say where the data was",
            where=checkpoint,
            expected=f"the place in a {'store' if on_store else 'list'}, in {STATE_FILE}",
            got="no such file"
            if state is None
            else f"a run on a {'store' if of_store else 'list'}",
            todo="go on from a checkpoint that is complete, with the same train_dataset",
        )
