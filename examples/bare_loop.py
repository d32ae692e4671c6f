"""Train a student on a store in a plain PyTorch loop, which goes on exactly where it was stopped.

    python examples/bare_loop.py STORE STUDENT --steps 100 --output OUTPUT [--resume]

STORE is what `kdstore dump` wrote; STUDENT is a folder of a model and the teacher's tokenizer.
After `scripts/demo`, build/demo/store and build/demo/ce are such. --resume goes on from
OUTPUT/checkpoint.pt.
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdstore
from kdstore.train.head import DistillHead, Request
from kdstore.train.objective import Objective
from kdstore.train.student import check_vocabulary


def main(argv: Sequence[str] | None = None) -> list[float]:
    """The loss of each step, in nats per scored position."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("student")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="padding included")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fused", action="store_true", help="never hold the logits of a batch")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = kdstore.open(args.store)
    # transformers loads bfloat16 weights as such, and small updates get lost in them.
    model = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32).to(device)
    # The ids of another tokenizer would train without an error, and teach nonsense.
    check_vocabulary(model, AutoTokenizer.from_pretrained(args.student), [store])
    if args.fused:
        DistillHead.attach(model)
    objective = Objective({"forward_kl": 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    loader = store.loader(batch_tokens=args.batch_tokens, seed=0, epochs=10**9)  # --steps ends it
    checkpoint, done, losses = args.output / "checkpoint.pt", 0, []
    if args.resume:
        saved = torch.load(checkpoint, map_location=device)
        for name, part in (("model", model), ("optimizer", optimizer), ("loader", loader)):
            part.load_state_dict(saved[name])
        done = saved["step"]

    model.train()
    batches = islice(loader, max(args.steps - done, 0))
    for step, batch in enumerate((batch.to(device) for batch in batches), start=done + 1):
        if args.fused:  # the same loss, taken within the model, some positions at a time
            loss = model(**batch.model_inputs(), distill=Request(objective, batch)).loss
        else:
            logits = model(**batch.model_inputs()).logits
            loss = kdstore.losses.forward_kl(logits, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}  forward_kl {losses[-1]:.4f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            # The loader's state is the place behind the batch just trained on, and less than 1 kB.
            # A student with dropout needs the state of torch's random numbers as well.
            parts = {"model": model, "optimizer": optimizer, "loader": loader}
            saved = {name: part.state_dict() for name, part in parts.items()} | {"step": step}
            args.output.mkdir(parents=True, exist_ok=True)
            torch.save(saved, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)  # a kill leaves the last one
    model.save_pretrained(args.output)
    return losses


if __name__ == "__main__":
    main()
