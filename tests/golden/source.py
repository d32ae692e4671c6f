"""The samples of golden stores, their plan, tokenizer and identity."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdstore.align import TokenTable, tokenizer_digest, tokenizer_files
from kdstore.codecs import IdOrder
from kdstore.codecs.registry import codec_name_for
from kdstore.codecs.rows import PLAIN_COLUMNS
from kdstore.sample import Sample, Span
from kdstore.writers.plan import Plan, make_plan
from tests.golden.recipes import Recipe

LARGE_VOCAB = 50_000
_WORDS = ("in", "the", "beginning", "was", "a", "word", "##s", "light", "dårk", "字", "##ly")
_NAMES = ("plain", "empty", "one-token", "unscored", "edges", "runs", "Ünïcode 漢字 🙂", "last")


class SmallFileOrder(IdOrder):
    """An id order that the slowest zstd writes: 40 kB of 500,000 ids, not 1.3 MB."""

    def to_bytes(self) -> bytes:
        """An Arrow IPC file with the same content as that of ``IdOrder``."""
        table = pa.ipc.open_file(super().to_bytes()).read_all()
        sink = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=19))
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        return sink.getvalue()


def samples_of(recipe: Recipe) -> list[Sample]:
    """Samples without signals: none scored, none at all, one token, several runs, all kinds."""
    random = np.random.default_rng(len(recipe.selection) * recipe.vocab_size)
    return [_sample(recipe, row, name, random) for row, name in enumerate(_NAMES)]


def _sample(recipe: Recipe, row: int, name: str, random: np.random.Generator) -> Sample:
    T = {"empty": 0, "one-token": 1, "edges": 25, "unscored": 5}.get(name, recipe.max_tokens + row)
    ids = _zipf_ids(T, recipe.vocab_size, random)
    spans = (Span(0, T, "text", name not in ("unscored", "empty")),)
    messages = None
    if name == "runs":
        kinds = ("system", "user", "assistant", "tool", "reasoning", "template", "poem")
        spans = (
            *(Span(i, i + 1, k, i % 2 == 0) for i, k in enumerate(kinds)),
            Span(8, T, "", True),
        )
        spans += (Span(T, T, "assistant", True),)
        messages = [{"role": "user", "content": 'a "quoted" \n dårk 字', "number": float("nan")}]
    text = None if messages or not recipe.texts else f"the {name} \u2028\\ \x7f"
    metadata = {"row": row, "ö": [None, 1e-05, {"deep": []}]} if row % 2 else None
    messages = messages if recipe.texts else None
    sample = Sample(name, ids, spans, text=text, messages=messages, metadata=metadata)
    return sample.with_score_rule("supervised")


def _zipf_ids(count: int, vocab_size: int, random: np.random.Generator) -> NDArray[np.int32]:
    """Ids of which the lower ones come again and again, as words do."""
    ids = np.floor(np.exp(random.uniform(0, np.log(vocab_size), count))).astype(np.int32)
    return np.where(random.random(count) < 0.5, ids % 7, ids) % vocab_size


def plan_of(recipe: Recipe, samples: list[Sample]) -> tuple[Plan, IdOrder]:
    """Plan and id order. Those of large vocabularies go by the id's middle byte."""
    plan, order = make_plan(
        ((row, [sample]) for row, sample in enumerate(samples)),
        unit_tokens=recipe.unit_tokens,
        vocab_size=recipe.vocab_size,
        where=recipe.name,
    )
    if recipe.vocab_size > LARGE_VOCAB:
        ids = np.arange(recipe.vocab_size, dtype=np.int32)
        by_middle_byte = np.lexsort((ids % 256, ids // 65536, ids // 256 % 256))
        return plan, SmallFileOrder(ids[by_middle_byte], order.successors)
    return plan, SmallFileOrder(order.id_of_V, order.successors)


def tokenizer_of() -> dict[str, bytes]:
    """Files of a tokenizer of a few words."""
    return tokenizer_files(_tokenizer())


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """What the store is."""
    main = {
        "selection": recipe.selection,
        "codec": codec_name_for(recipe.selection),
        "scalars": list(recipe.scalars),
        "scored": "supervised",
    }
    audit = {
        "selection": "full",
        "codec": codec_name_for("full"),
        "scalars": [],
        "fraction": recipe.audit_fraction,
    }
    tokenizer = _tokenizer()
    return {
        "teacher": {"name": "zipf", "revision": "1", "dtype": "float32", "logits_dtype": "float32"},
        "vocab_size": recipe.vocab_size,
        "vocab_digest": TokenTable.from_tokenizer(tokenizer).fingerprint(),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "tokenization": {"add_bos": False, "bos_token_id": None, "chat_template_sha256": None},
        "input": {"keep_text": recipe.texts},
        "signals": {"main": main, **({"audit": audit} if recipe.audit_fraction else {})},
        "source": {"made_by": "tests/golden/source.py"},
        "unit_tokens": recipe.unit_tokens,
        "columns": [n for n in PLAIN_COLUMNS if recipe.texts or n not in ("text", "messages")],
        "seed": 7,
    }


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ("[UNK]", *_WORDS)
    model = models.WordPiece({word: i for i, word in enumerate(names)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
