"""Generating: all prompts of a source, block by block, before a store is planned.

A fixed plan has to know all lengths, so completions are finished before the first is scored. A
block is the prompts of so many consecutive rows. It appears whole or not at all, depends on no
other, and every draw is keyed by its sample and position: so what a killed run left is completed
to what an undisturbed one would have made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kdstore.completion import Completion, GeneratingTeacher, Prompt, Sampling
from kdstore.errors import InputError, StoreMismatchError, TeacherError
from kdstore.filesystem import Folder
from kdstore.generate.blocks import ANNOTATION, CompletionSource, block_bytes
from kdstore.generate.prompts import PromptSource, survey
from kdstore.generate.settings import Settings, read_settings
from kdstore.header import check_same_identity, read_header
from kdstore.layout import GENERATED, GENERATION, HEADER, block_of_path, block_path
from kdstore.progress import Progress
from kdstore.sample import Sample
from kdstore.writers.store import check_free


def open_generation(
    folder: Folder,
    source: PromptSource,
    sampling: Sampling,
    identity: dict[str, Any],
    *,
    vocab_size: int,
    quiet: bool = False,
) -> Generation:
    """The completions in a store's folder, begun if there are none; ``identity`` names them.

    Raises StoreMismatchError if completions or store are others, UsageError if the folder holds
    something else, and InputError for rows that are no prompts.
    """
    planned = folder.exists(HEADER)
    if planned:
        _check_store(folder, identity)
    elif not folder.exists(GENERATION):
        check_free(folder)
        settings = survey(source, identity, vocab_size=vocab_size, quiet=quiet)
        folder.create(GENERATION, settings.to_bytes())
    generation = Generation(
        folder=folder, source=source, sampling=sampling, settings=read_settings(folder, identity)
    )
    if planned and (missing := generation.pending_blocks()):
        raise InputError(
            "completions are gone that the store was planned from",
            where=folder.location(GENERATED),
            expected=f"{generation.settings.num_blocks} blocks",
            got=f"no {', '.join(map(block_path, missing[:3]))}",
            todo="restore them from a backup, or dump into a new folder",
        )
    return generation


def _check_store(folder: Folder, identity: dict[str, Any]) -> None:
    made_of = read_header(folder).identity.get("source", {}).get(ANNOTATION)
    if made_of is None:
        raise StoreMismatchError(
            "the store was not made of completions",
            where=folder.url,
            expected="a dump without --generate",
            got="--generate",
            todo="dump into a new folder",
        )
    check_same_identity(made_of, identity, where=folder.url)


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """The completions of a source in a store's folder, finished or not."""

    folder: Folder
    source: PromptSource
    sampling: Sampling
    settings: Settings

    def pending_blocks(self, *, worker: int = 0, num_workers: int = 1) -> list[int]:
        """Blocks that are not there yet, of those that fall to one of several workers."""
        done = {block_of_path(name) for name in self.folder.names(GENERATED)}
        blocks = range(worker, self.settings.num_blocks, num_workers)
        return [block for block in blocks if block not in done]

    def run(self, teacher: GeneratingTeacher, blocks: Sequence[int], *, quiet: bool) -> None:
        """Complete the prompts of blocks, in order; TeacherError if one is left unanswered."""
        share = len(blocks) / max(self.settings.num_blocks, 1)
        total = round(share * self.settings.num_prompts * self.sampling.num_samples)
        with Progress("generate", total=None, unit="tokens", quiet=quiet) as progress:
            work = _Work(self, progress, expected=total)
            for completion in teacher.generate(work.groups(blocks), self.sampling):
                work.add(completion)
            work.check_finished()

    def completions(self) -> CompletionSource:
        """The rows to score, once no block is pending."""
        settings = self.settings
        return CompletionSource(
            self.folder, num_blocks=settings.num_blocks, identity=settings.identity
        )

    def blocks(self, wanted: Sequence[int]) -> Iterator[tuple[int, list[Sample]]]:
        """Each wanted block with its prompts, from one pass over the source."""
        if not wanted:
            return
        size = int(self.settings.identity["block_rows"])
        rows = self.source.rows.rows(wanted[0] * size)
        for block, content in groupby(rows, key=lambda numbered: numbered[0] // size):
            if block in wanted:
                found = [self.source.read(*numbered) for numbered in content]
                yield block, [prompt for prompts in found for prompt in prompts]
            if block >= wanted[-1]:
                return


class _Block:
    """A block in the making: its requests in order, and what has come of them."""

    def __init__(self, prompts: Sequence[Sample], requests: Sequence[list[Prompt]]) -> None:
        self.asked = {
            request.sample_id: prompt
            for prompt, group in zip(prompts, requests, strict=True)
            for request in group
        }
        self.found: dict[str, Completion] = {}

    @property
    def complete(self) -> bool:
        return len(self.found) == len(self.asked)

    def to_bytes(self) -> bytes:
        return block_bytes([(self.asked[name], self.found[name]) for name in self.asked])


class _Work:
    """Blocks on their way through a teacher, each written when its last completion comes."""

    def __init__(self, generation: Generation, progress: Progress, *, expected: int) -> None:
        self._generation, self._progress = generation, progress
        self._expected = expected
        self._count = self._cut = 0
        self._open: dict[int, _Block] = {}
        self._block_of: dict[str, int] = {}

    def groups(self, blocks: Sequence[int]) -> Iterable[list[Prompt]]:
        """The requests of each block, which is open from here on."""
        source, sampling = self._generation.source, self._generation.sampling
        for number, prompts in self._generation.blocks(blocks):
            requests = [source.requests(prompt, sampling) for prompt in prompts]
            self._open[number] = _Block(prompts, requests)
            self._block_of |= dict.fromkeys(self._open[number].asked, number)
            self._write_if_complete(number)
            yield [request for group in requests for request in group]

    def add(self, completion: Completion) -> None:
        """Keep an answer."""
        number = self._block_of.pop(completion.sample_id)
        self._open[number].found[completion.sample_id] = completion
        self._count += 1
        self._cut += completion.finish_reason == "length"
        self._progress.advance(len(completion.ids_T))
        mean = self._progress.done / self._count
        self._progress.expect(round(mean * max(self._expected, self._count)))
        self._write_if_complete(number)

    def check_finished(self) -> None:
        """TeacherError for a prompt without an answer; else says how it went."""
        for sample_id in self._block_of:
            raise TeacherError(
                "the teacher left a prompt unanswered",
                where=f"sample {sample_id!r}",
                expected="a completion",
                got="nothing",
            )
        self._progress.expect(self._progress.done)
        share = self._cut / max(self._count, 1)
        self._progress.note(f"in {self._count} completions, {share:.1%} cut at their limit")

    def _write_if_complete(self, number: int) -> None:
        if self._open[number].complete:
            block = self._open.pop(number)
            self._generation.folder.create(block_path(number), block.to_bytes())
