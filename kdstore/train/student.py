"""The student of a run: its model, its tokenizer, and whether the store fits it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdstore.align import TokenTable
from kdstore.errors import StoreMismatchError, UsageError
from kdstore.teachers.probe import is_causal, keeps_packed_apart, probing
from kdstore.train.attention import VARLEN_SDPA, register_varlen_sdpa
from kdstore.train.config import StudentConfig
from kdstore.train.prune import prune_layers

if TYPE_CHECKING:
    from kdstore.readers.store import Store

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def build_student(config: StudentConfig, *, seed: int) -> nn.Module:
    """The saved model, a pruned copy, or a new one of its configuration and ``seed`` only.

    Raises UsageError if transformers cannot load it or there are no such layers.
    """
    with _refusals(config):
        # Else transformers would ask the hub for a model of that name.
        if config.config is not None and not Path(config.config).is_dir():
            raise FileNotFoundError("no such folder")
        options = {"dtype": getattr(torch, config.dtype)}
        if config.attn_implementation == VARLEN_SDPA:
            register_varlen_sdpa()
        if config.attn_implementation is not None:
            options["attn_implementation"] = config.attn_implementation
        if config.config is not None:
            torch.manual_seed(seed)
            architecture = AutoConfig.from_pretrained(config.config)
            return AutoModelForCausalLM.from_config(architecture, **options)  # type: ignore[no-any-return]
        model = AutoModelForCausalLM.from_pretrained(config.source, **options)
    return model if config.layers is None else prune_layers(model, config.layers)


@contextmanager
def _refusals(config: StudentConfig) -> Iterator[None]:
    """UsageError for what transformers raises where it cannot load a student."""
    key = next(name for name in ("path", "config", "prune") if getattr(config, name) is not None)
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        attention = config.attn_implementation
        raise UsageError(
            "the student cannot be loaded",
            where=f"student.{key}: {getattr(config, key)}"
            + (f", student.attn_implementation: {attention}" if attention else ""),
            expected="a folder with config.json" if key == "config" else "a saved model",
            got=str(error).splitlines()[0],
            todo="check the path (a name that is no folder is looked for on the model hub)"
            + (" and the attention" if attention else ""),
        ) from error


def load_tokenizer(config: StudentConfig, store: Store) -> Any:
    """The tokenizer saved with the student; the store's if the student is new or has none."""
    if config.source is not None and _has_tokenizer(config.source):
        return AutoTokenizer.from_pretrained(config.source)
    with TemporaryDirectory() as folder:
        store.copy_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder)


def check_vocabulary(model: Any, tokenizer: Any, stores: Sequence[Store]) -> None:
    """Raise StoreMismatchError unless the student means and has every id that is stored."""
    found = TokenTable.from_tokenizer(tokenizer).fingerprint()
    for store in stores:
        if found != store.vocab_digest:
            raise StoreMismatchError(
                "the student's tokenizer gives other meanings to the store's token ids",
                where=store.folder.url,
                expected=f"vocab_digest {store.vocab_digest}",
                got=f"vocab_digest {found}",
                todo="train a student with the teacher's tokenizer",
            )
    # Ids that the tokenizer does not have are padding of the teacher's logits and never stored.
    needed = min(max(store.vocab_size for store in stores), len(tokenizer))
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < needed:
        raise StoreMismatchError(
            "the student's vocabulary is smaller than the store's",
            expected=f"at least {needed} rows in the student's head",
            got=rows,
            todo="set vocab_size in the student's config.json, or resize its embeddings",
        )


def check_architecture(model: Any, *, pack: bool) -> None:
    """Raise StoreMismatchError unless the student is causal and keeps packed samples apart."""
    by_lengths = model.config._attn_implementation == VARLEN_SDPA
    with probing(model):
        causal = is_causal(model)
        apart = not pack or by_lengths or keeps_packed_apart(model)
    if pack and by_lengths:
        with probing(model, known=VARLEN_SDPA):
            apart = keeps_packed_apart(model, by_lengths=True)
    if not causal:
        raise StoreMismatchError(
            "the student sees the token that it is to predict",
            where=type(model).__name__,
            expected="a causal language model",
            got=model.config.model_type,
            todo="use a decoder, or set is_decoder in its config.json if it is one",
        )
    if not apart:
        raise StoreMismatchError(
            "this student does not keep packed samples apart",
            where=type(model).__name__,
            expected="the same logits packed and alone",
            got=model.config.model_type,
            todo="set loader.pack: false",
        )


def longest_sequence(model: Any) -> int | None:
    """Tokens that a student takes at most; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _has_tokenizer(path: str) -> bool:
    """Whether a folder holds a tokenizer; a model that is no folder (a hub name) always does."""
    folder = Path(path)
    return not folder.is_dir() or any((folder / name).exists() for name in _TOKENIZER_FILES)
