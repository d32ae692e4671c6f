"""What a trainer reads of stores: a loader's batches, and the place of the last one trained on."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdstore.errors import UsageError
from kdstore.readers.batches import BatchConfig
from kdstore.readers.loader import Loader
from kdstore.readers.mixture import Mixture, parts_of
from kdstore.readers.samples import Samples
from kdstore.train.fields import refuse_reserved, refuse_unknown

if TYPE_CHECKING:
    from kdstore.readers.collate import Batch

# Options of a loader that are the trainer's to set.
_ELSEWHERE = {
    "epochs": "set num_train_epochs",
    "rank": "leave it out: it is this process's",
    "world_size": "leave it out: it is that of the processes",
    "num_workers": "set dataloader_num_workers",
    "multiprocessing_context": "set dataloader_multiprocessing_context",
    "group": "set gradient_accumulation_steps",
}
_OPTIONS = {one.name for one in fields(BatchConfig)} | {"columns", "keep", "pad_id", "weights"}


def is_loaded(dataset: Any) -> bool:
    """Whether batches of a data set come from a loader; of a list of samples they do not."""
    return isinstance(dataset, Samples | Mixture)


def loader_options(
    args: TrainingArguments, given: Mapping[str, Any], *, batch_size: int
) -> dict[str, Any]:
    """Options of a loader: those ``given``, and what the training arguments say of the others.

    ``batch_tokens`` takes the place of ``batch_size``. Raises UsageError for options that no loader
    has, or that are the trainer's.
    """
    refuse_reserved(given, _ELSEWHERE, where="loader")
    refuse_unknown(given, _OPTIONS, where="loader")
    if args.dataloader_drop_last:
        raise UsageError(
            "dataloader_drop_last does not work on a store",
            where="TrainingArguments",
            expected="no dataloader_drop_last",
            got=True,
            todo="leave it out: ranks without a batch get one that teaches nothing",
        )
    sized = {} if given.get("batch_tokens") is not None else {"batch_size": batch_size}
    return {
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "shuffle": str(args.train_sampling_strategy) == "random",
        "num_workers": args.dataloader_num_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "group": args.gradient_accumulation_steps,
        **sized,
        **given,
    }


class Feed:
    """The batches of a run, epoch after epoch: what Trainer takes for its data loader.

    It is read by one iteration that goes through all epochs, so that workers stay and read ahead
    across their ends. It never ends by itself; ``epoch_ended`` says when to call an epoch over.
    """

    def __init__(
        self, data: Samples | Mixture, options: Mapping[str, Any], state: dict[str, Any] | None
    ) -> None:
        self.dataset = data  # Trainer and its integrations look at it
        self._loader = Loader(data, epochs=sys.maxsize, **options)
        if self._loader.is_empty:
            raise UsageError(
                "there is nothing to train on",
                where=f"{data}",
                expected="at least one batch",
                got="no sample, or none of the lengths that are wanted",
                todo="look at min_tokens, max_tokens and overlong of the loader",
            )
        if state is not None:
            self._loader.load_state_dict(state)
        self._group = int(options["group"])
        self.state = self._loader.state_dict()
        self._began = self.epochs_done
        self._batches: Generator[Batch, None, None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = iter(self._loader)
        return self._batches

    def close(self) -> None:
        """Stop what reads ahead."""
        if self._batches is not None:
            self._batches.close()

    def trained_on(self, batch: Batch) -> None:
        """Remember the place behind a batch: ``state`` is that of the last one trained on."""
        self.state = batch.cursor

    @property
    def epoch_ended(self) -> bool:
        """Whether the last batch that was trained on was one of the last of its epoch."""
        return bool(self.state["batch"] == 0)

    @property
    def epochs_done(self) -> float:
        """Epochs trained on, by samples: 1.25 where a quarter of the second is done."""
        return self._loader.epochs_before(self.state)

    @property
    def samples_done(self) -> int:
        """Samples trained on in this run, of all ranks."""
        an_epoch = sum(part.samples_per_epoch for part in parts_of(self.dataset))
        return round((self.epochs_done - self._began) * an_epoch)

    def steps_until(self, epochs: float) -> int:
        """Optimizer steps from here until so many epochs are over; the last need not be whole."""
        left = self._loader.count_steps(max(math.ceil(epochs) - self.state["epoch"], 0))
        steps = [count // self._group for count in left]
        if steps and epochs % 1:
            here = -(-self.state["batch"] // (self._loader.world_size * self._group))
            done = here if len(steps) == 1 else 0
            share = round(epochs % 1 * (steps[-1] + done), 6)  # 2.3 % 1 is not quite 0.3
            steps[-1] = max(math.ceil(share) - done, 0)
        return sum(steps)


class EpochEnds(TrainerCallback):  # type: ignore[misc]
    """Tells Trainer, which counts on epochs of one length, where each epoch of a feed ends."""

    def __init__(self) -> None:
        self.feed: Feed | None = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Correct the epoch, and end it if this step was its last."""
        del args, kwargs
        if self.feed is not None:
            state.epoch = self.feed.epochs_done
            control.should_epoch_stop |= self.feed.epoch_ended
        return control
