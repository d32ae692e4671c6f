"""Train a student on a store with accelerate: on any number of GPUs, with gradient accumulation.

    accelerate launch examples/accelerate_script.py STORE STUDENT --steps 100 --output OUTPUT

STORE is what `kdstore dump` wrote; STUDENT is a folder of a model and the teacher's tokenizer.
After `scripts/demo`, build/demo/store and build/demo/ce are such. A step is
--accumulate batches of each process: two processes do what one does with twice as many.
--resume OUTPUT/checkpoint-50 goes on, also with other numbers. Several processes on CPUs need
ACCELERATE_USE_CPU=true; without it, each would train by itself.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdstore
from kdstore.train.head import DistillHead, Request
from kdstore.train.objective import Objective
from kdstore.train.student import check_vocabulary


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("student")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="padding included")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a process in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--resume", help="a checkpoint")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """The loss of each step, in nats per scored position of all processes."""
    args = parse(argv)
    accelerator = Accelerator()  # backward divides by its gradient_accumulation_steps: leave it 1
    store = kdstore.open(args.store)
    # transformers loads bfloat16 weights as such, and small updates get lost in them.
    model = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    # The ids of another tokenizer would train without an error, and teach nonsense.
    check_vocabulary(model, AutoTokenizer.from_pretrained(args.student), [store])
    DistillHead.attach(model)  # losses without logits; before the model is wrapped
    objective = Objective({"forward_kl": 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    model, optimizer = accelerator.prepare(model, optimizer)
    # Neither of the others is prepared. accelerate would step the schedule once for each process.
    # The loader deals batches to processes itself, so that each reads only its own, and goes on
    # exactly; ``group`` completes the last step of an epoch by batches that count for nothing.
    processes = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = store.loader(
        batch_tokens=args.batch_tokens, seed=0, epochs=10**9, group=args.accumulate, **processes
    )
    accelerator.register_for_checkpointing(loader, warmup)
    if args.resume:
        accelerator.load_state(args.resume)

    model.train()
    losses, batches = [], iter(loader)
    for step in range(warmup.last_epoch + 1, args.steps + 1):
        micro = [batch.to(accelerator.device) for batch in islice(batches, args.accumulate)]
        # One denominator for the step. A mean of each batch's mean would give the tokens of small
        # batches more weight, and change with the number of processes.
        scored = torch.tensor(sum(len(batch.signal) for batch in micro), device=accelerator.device)
        scored = accelerator.reduce(scored, reduction="sum").clamp(min=1)
        value = torch.zeros((), device=accelerator.device)
        for left, batch in zip(reversed(range(len(micro))), micro, strict=True):
            request = Request(objective, batch, denominator=scored)
            with accelerator.no_sync(model) if left else nullcontext():
                loss = model(**batch.model_inputs(), distill=request).loss
                # Gradients are averaged over processes, but these losses are parts of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            value += loss.detach()
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(value, reduction="sum").item())
        accelerator.print(f"step {step}  forward_kl {losses[-1]:.4f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            accelerator.save_state(f"{args.output}/checkpoint-{step}")
    weights = accelerator.get_state_dict(model)  # on every process: sharded weights are gathered
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output, state_dict=weights)
    # The wrapped model holds on to the process group; on CPUs, ending that first may hang for ever.
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
