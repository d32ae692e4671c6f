"""Train the teacher of the demo from `text/`, and write the student's configuration.

    python train_teacher.py                 # rewrites teacher/ and student/, CPU only

The teacher is a byte-level BPE tokenizer and a Llama model under 2 M parameters, small enough to
commit and trained long enough to be worth imitating. `teacher/training.json` has every figure.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
VOCAB_SIZE = 2048
WINDOW_TOKENS = 512
# In bfloat16, two bytes a weight, the file stays under this.
MAX_WEIGHT_BYTES = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the teacher is trained; the defaults gave the committed weights."""

    seed: int = 0
    epochs: float = 14.0
    batch_windows: int = 8
    learning_rate: float = 2e-3
    min_learning_rate_share: float = 0.02
    warmup_share: float = 0.05
    weight_decay: float = 0.3
    dropout: float = 0.2
    clip_norm: float = 1.0
    threads: int = 2


def llama_config(*, hidden: int, layers: int, mlp: int, heads: int, kv_heads: int) -> LlamaConfig:
    """Llama configuration with tied embeddings and the vocabulary of the demo."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=WINDOW_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        architectures=["LlamaForCausalLM"],
    )


def teacher_config() -> LlamaConfig:
    """Configuration of the teacher: 1.8 M weights."""
    return llama_config(hidden=192, layers=4, mlp=448, heads=6, kv_heads=2)


def student_config() -> LlamaConfig:
    """Configuration of the student: a quarter of the teacher's weights."""
    return llama_config(hidden=128, layers=2, mlp=256, heads=4, kv_heads=2)


def read_texts(path: Path) -> list[str]:
    """The `text` of every row of a JSON-lines file."""
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens; it adds no special token by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=WINDOW_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, *, out: Path) -> None:
    """Save into the model folder `out`, under a class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of every text, closed by the end token; the begin token is left to the windows."""
    eos = SPECIAL_TOKENS.index(EOS)
    return [[*ids, eos] for ids in tokenizer(texts, verbose=False)["input_ids"]]


def cut_windows(documents: list[list[int]]) -> list[list[int]]:
    """Each document in pieces of at most `WINDOW_TOKENS`, the begin token in front of each."""
    bos, step = SPECIAL_TOKENS.index(BOS), WINDOW_TOKENS - 1
    return [[bos, *ids[at : at + step]] for ids in documents for at in range(0, len(ids), step)]


def draw_batches(documents: list[list[int]], recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless int64 batches of full windows (batch_windows, WINDOW_TOKENS).

    Each epoch shuffles the documents and cuts their concatenation at another offset, so that the
    same window is hardly seen twice: with so little text that delays overfitting.
    """
    bos, step = SPECIAL_TOKENS.index(BOS), WINDOW_TOKENS - 1
    draw = random.Random(recipe.seed)
    windows: list[list[int]] = []
    while True:
        order = draw.sample(documents, k=len(documents))
        stream = list(chain.from_iterable(order))[draw.randrange(step) :]
        epoch = [[bos, *stream[at : at + step]] for at in range(0, len(stream) - step, step)]
        windows += draw.sample(epoch, k=len(epoch))
        while len(windows) >= recipe.batch_windows:
            yield torch.tensor(windows[: recipe.batch_windows])
            del windows[: recipe.batch_windows]


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of every token but the first of each row, flat float32."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, documents: list[list[int]]) -> float:
    """Mean nats per token over all tokens of the documents, end tokens included."""
    model.eval()
    losses = [token_losses(model, torch.tensor([window])) for window in cut_windows(documents)]
    model.train()
    return float(torch.cat(losses).double().mean())


def unigram_loss(train: list[list[int]], heldout: list[list[int]]) -> float:
    """Held-out mean nats per token under the training frequencies, with add-one smoothing."""
    counts = torch.bincount(torch.tensor(list(chain.from_iterable(train))), minlength=VOCAB_SIZE)
    logprobs = torch.log_softmax((counts + 1).double().log(), dim=0)
    return float(-logprobs[torch.tensor(list(chain.from_iterable(heldout)))].mean())


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Drop a share of what the embedding and each attention and MLP block put out, in training.

    Llama has none of its own, and without it the held-out loss turns up after nine epochs. The
    hooks are not saved and are idle in evaluation.
    """

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, share, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "mlp")):
            module.register_forward_hook(drop)


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def learning_rate_share(step: int, *, steps: int, recipe: Recipe) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine."""
    warmup = max(1, round(steps * recipe.warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return recipe.min_learning_rate_share + (1 - recipe.min_learning_rate_share) * cosine


def train_step(
    model: LlamaForCausalLM, ids: torch.Tensor, *, optimizer: torch.optim.Optimizer, clip: float
) -> float:
    """One update; the batch's mean loss before it. The forward pass runs in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_losses(model, ids).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


def train_model(
    train: list[list[int]], heldout: list[list[int]], *, recipe: Recipe, steps: int
) -> LlamaForCausalLM:
    """The trained teacher in float32; prints the losses every so often."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(teacher_config())
    add_dropout(model, recipe.dropout)
    optimizer = make_optimizer(model, recipe)
    batches = draw_batches(train, recipe)
    started = time.monotonic()
    for step in range(steps):
        share = learning_rate_share(step, steps=steps, recipe=recipe)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * share
        loss = train_step(model, next(batches), optimizer=optimizer, clip=recipe.clip_norm)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            losses = f"train {loss:.3f} held-out {heldout_loss(model, heldout):.3f}"
            seconds = f"{time.monotonic() - started:.0f} s"
            print(f"step {step + 1}/{steps} {losses} {seconds}", flush=True)
    return model


def save_model(model: LlamaForCausalLM, *, out: Path) -> None:
    """Save as bfloat16 into the folder `out`.

    Raises:
        ValueError: the weights would pass `MAX_WEIGHT_BYTES`.
    """
    model.bfloat16().save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"the weights have {size} bytes, limit {MAX_WEIGHT_BYTES}; shrink them")


def check_saved(out: Path, *, heldout_texts: list[str], heldout: list[list[int]]) -> float:
    """Held-out loss of the folder as a user loads it, in float32.

    Raises:
        ValueError: the saved tokenizer splits text otherwise than the one trained with.
    """
    tokenizer = AutoTokenizer.from_pretrained(out)
    if encode_documents(tokenizer, heldout_texts) != heldout:
        raise ValueError(f"the tokenizer saved in {out} gives other token ids than the trained one")
    if tokenizer.batch_decode([ids[:-1] for ids in heldout]) != heldout_texts:
        raise ValueError(f"the tokenizer saved in {out} does not give back the text it was given")
    return heldout_loss(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), heldout)


def write_json(path: Path, figures: dict[str, object]) -> None:
    """Write a dict as indented JSON."""
    path.write_text(json.dumps(figures, indent=2) + "\n")


def build(*, text: Path, out: Path, recipe: Recipe, steps: int | None) -> None:
    """Train, save and measure the teacher into `out`/teacher, with `out`/student beside it."""
    torch.set_num_threads(recipe.threads)
    texts, heldout_texts = read_texts(text / "teacher.jsonl"), read_texts(text / "heldout.jsonl")
    tokenizer = train_tokenizer(texts)
    train = encode_documents(tokenizer, texts)
    heldout = encode_documents(tokenizer, heldout_texts)
    train_tokens = sum(map(len, train))
    steps = steps or round(recipe.epochs * train_tokens / recipe.batch_windows / WINDOW_TOKENS)

    started = time.monotonic()
    model = train_model(train, heldout, recipe=recipe, steps=steps)
    seconds = time.monotonic() - started
    save_model(model, out=out / "teacher")
    save_tokenizer(tokenizer, out=out / "teacher")
    student_config().save_pretrained(out / "student")
    figures = {
        "heldout_loss_nats": check_saved(
            out / "teacher", heldout_texts=heldout_texts, heldout=heldout
        ),
        "heldout_unigram_loss_nats": unigram_loss(train, heldout),
        "heldout_tokens": sum(map(len, heldout)),
        "train_tokens": train_tokens,
        "steps": steps,
        "parameters": model.num_parameters(),
        "student_parameters": LlamaForCausalLM(student_config()).num_parameters(),
        "seconds": round(seconds, 1),
        "recipe": asdict(recipe),
    }
    write_json(out / "teacher" / "training.json", figures)
    print(json.dumps(figures, indent=2))


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=HERE / "text", help="folder of the texts")
    parser.add_argument("--out", type=Path, default=HERE, help="parent of teacher/ and student/")
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    text, out, steps = (arguments.pop(name) for name in ("text", "out", "steps"))
    build(text=text, out=out, recipe=Recipe(**arguments), steps=steps)


if __name__ == "__main__":
    main()
