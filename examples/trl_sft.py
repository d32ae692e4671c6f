"""Train a student on a store with TRL's SFTTrainer, whose loss becomes what the teacher said.

    pip install trl
    accelerate launch examples/trl_sft.py STORE STUDENT --steps 100 --output OUTPUT [--resume]

STORE is what `kdstore dump` wrote; STUDENT is a folder of a model and the teacher's tokenizer.
After `scripts/demo`, build/demo/store and build/demo/ce are such. --resume goes on from
the last checkpoint in OUTPUT.
TRL tells its makers that it is used, unless HF_HUB_DISABLE_TELEMETRY=1 is set.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import kdstore
from kdstore.readers.sampler import EpochSampler
from kdstore.train.head import DistillHead, Request
from kdstore.train.objective import Objective
from kdstore.train.student import check_vocabulary


def rows_of(store: kdstore.Store) -> Iterator[dict[str, int]]:
    """A row for each sample, epoch after epoch, in an order that decodes each once an epoch.

    In Trainer's random order, each sample would cost the decoding of the hundreds beside it.
    """
    order = EpochSampler(store, seed=0)
    for epoch in count():
        order.set_epoch(epoch)
        for index in order:  # a number, or with its draw where the store has several
            sample, draw = index if isinstance(index, tuple) else (index, 0)
            yield {"sample": sample, "draw": draw}


class StoreCollator:
    """Rows to a model's inputs, the labels, which Trainer counts, and the Batch with the signal."""

    def __init__(self, store: kdstore.Store) -> None:
        self.store, self.collate = store, kdstore.Collator()

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        samples = self.store.__getitems__([(row["sample"], row["draw"]) for row in rows])
        batch = self.collate(samples)
        return {**batch.model_inputs(), "labels": batch.labels, "batch": batch}


class StoreSFTTrainer(SFTTrainer):
    """SFTTrainer with another loss. TRL's metrics are made with its own, and are not logged."""

    objective = Objective({"forward_kl": 1.0})

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A batch's share of the mean over the step's labels, of all its batches and processes."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        scored, parts = None, 1  # in evaluation: the mean of this batch
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, but these losses are parts of a sum.
            scored, parts = num_items_in_batch.clamp(min=1), self.accelerator.num_processes
        request = Request(self.objective, inputs.pop("batch"), denominator=scored)
        outputs = model(**inputs, distill=request)
        return (outputs.loss * parts, outputs) if return_outputs else outputs.loss * parts


def main(argv: Sequence[str] | None = None) -> list[float]:
    """The loss of each step, in nats per scored position."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("student")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a process in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)

    store = kdstore.open(args.store)
    # transformers loads bfloat16 weights as such, and small updates get lost in them.
    model = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    # The ids of another tokenizer would train without an error, and teach nonsense.
    check_vocabulary(model, tokenizer, [store])
    DistillHead.attach(model)  # losses without logits; before the model is wrapped
    on_gpu = torch.cuda.is_available()
    config = SFTConfig(
        output_dir=args.output,
        max_steps=args.steps,
        save_steps=args.save_every,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        dataset_kwargs={"skip_prepare_dataset": True},  # there is no text in the rows
        remove_unused_columns=False,  # no model takes the columns "sample" and "draw"
        train_sampling_strategy="sequential",  # the rows are shuffled
        bf16=on_gpu,  # SFTConfig's default is True on CPUs as well
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        report_to="none",
    )
    num_rows = args.steps * args.batch_size * args.accumulate * config.world_size
    trainer = StoreSFTTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(list(islice(rows_of(store), num_rows))),
        data_collator=StoreCollator(store),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
