"""The hooks on vLLM's two model runners, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdstore.audit import AUDIT_SELECTION
from kdstore.errors import TeacherError
from kdstore.teachers.vllm.hooks import check_v1, check_v2, install
from kdstore.teachers.vllm.packing import unpack
from kdstore.teachers.vllm.request import OPEN_END
from tests.teachers.vllm.helpers import IGNORED_WARNINGS, assert_same_signal
from tests.teachers.vllm.test_tap import Text, V, head

pytestmark = IGNORED_WARNINGS


def params(text: Text | None) -> SimpleNamespace:
    extra = None if text is None else text.request.to_extra_args()
    return SimpleNamespace(extra_args=extra, prompt_logprobs=None, prompt_logprob_token_ids=None)


class FakeV1:
    """What the tap reads of a V1 runner, and the method that it looks on at."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(compute_logits=head)
        self.requests: dict[str, SimpleNamespace] = {}
        self.input_batch = SimpleNamespace(req_id_to_index={})
        self.query_start_loc = SimpleNamespace(np=np.zeros(0, np.int32))
        self.asked: list[dict[str, int]] = []

    def _get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens):
        self.asked.append(num_scheduled_tokens)
        return {"stock": None}

    def add(self, name: str, text: Text, *, prompt: int, tapped: bool = True) -> None:
        self.requests[name] = SimpleNamespace(
            sampling_params=params(text if tapped else None),
            prompt_token_ids=text.ids_T[:prompt].tolist(),
            output_token_ids=[],
            num_computed_tokens=0,
            text=text,
        )

    def step(self, scheduled: dict[str, int]) -> object:
        """As the runner does: batch order is not the scheduler's, and sampling comes first."""
        names = sorted(scheduled, reverse=True)
        self.input_batch.req_id_to_index = {name: i for i, name in enumerate(names)}
        starts = np.cumsum([0, *(scheduled[name] for name in names)])
        self.query_start_loc.np = starts.astype(np.int32)
        hidden = []
        for name in names:
            state = self.requests[name]
            end = state.num_computed_tokens + scheduled[name]
            hidden.append(state.text.hidden_TD[state.num_computed_tokens : end])
            if end >= len(state.prompt_token_ids) and end < len(state.text.ids_T):
                state.output_token_ids.append(int(state.text.ids_T[end]))
        answer = self._get_prompt_logprobs_dict(torch.cat(hidden), scheduled)
        for name in names:
            self.requests[name].num_computed_tokens += scheduled[name]
        return answer


def answers_of(tap, texts):
    keys = [text.request.key for text in texts]
    selection = texts[0].request.rule.selection
    answers, tally = unpack(tap.take(keys), selection=selection, audit=AUDIT_SELECTION)
    assert not tally.error
    return answers


def test_v1_prompts_in_chunks_beside_others():
    runner = FakeV1()
    tap, name = install(runner, vocab_size=V)
    a, b = Text(1, 20, ((1, 20),)), Text(2, 9, ((4, 9),))
    other = Text(3, 9, ((1, 9),))
    runner.add("a", a, prompt=20)
    runner.add("b", b, prompt=9)
    runner.add("other", other, prompt=9, tapped=False)
    assert runner.step({"a": 7, "other": 9}) == {"stock": None}
    runner.step({"b": 9, "a": 13})
    assert name == "v1"
    assert runner.asked == [{"a": 7, "other": 9}, {"b": 9, "a": 13}]
    for text, answer in zip((a, b), answers_of(tap, [a, b]), strict=True):
        positions, signal, _ = text.expected()
        np.testing.assert_array_equal(answer.positions_S, positions)
        assert_same_signal(answer.signal, signal)
    assert len(answers_of(tap, [other])[0].positions_S) == 0


def test_v1_scores_what_it_generates_in_the_same_pass():
    runner = FakeV1()
    tap, _ = install(runner, vocab_size=V)
    text = Text(1, 12, ((5, OPEN_END),))
    runner.add("a", text, prompt=5)
    for count in (3, 2, *[1] * 6):
        runner.step({"a": count})
    answer = answers_of(tap, [text])[0]
    np.testing.assert_array_equal(answer.positions_S, np.arange(5, 12))
    assert_same_signal(answer.signal, text.expected()[1])


def v2_runner(states: int = 8, length: int = 32) -> SimpleNamespace:
    """A runner with vLLM's own worker for prompt log-probabilities, and its table of tokens."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    return SimpleNamespace(
        model=SimpleNamespace(compute_logits=head),
        prompt_logprobs_worker=PromptLogprobsWorker(states, torch.device("cpu")),
        all_token_ids=torch.zeros(states, length, dtype=torch.int32),
        prompt_lens=np.zeros(states, np.int32),
    )


def v2_add(runner, name: str, state: int, text: Text | None, ids) -> None:
    runner.all_token_ids[state, : len(ids)] = ids
    runner.prompt_lens[state] = len(ids)
    runner.prompt_logprobs_worker.add_request(name, state, params(text))


def v2_step(runner, rows: list[tuple[str, int, Text, int, int]]) -> object:
    """Rows of (request, its state, its text, first row, number of rows)."""
    starts = np.cumsum([0, *(count for *_, count in rows)])
    states = np.array([state for _, state, *_ in rows])
    batch = SimpleNamespace(
        req_ids=[name for name, *_ in rows],
        idx_mapping_np=states,
        num_computed_prefill_tokens_np=np.array([first for *_, first, _ in rows]),
        num_scheduled_tokens=np.array([count for *_, count in rows]),
        query_start_loc_np=starts,
        prefill_len_np=runner.prompt_lens[states],
        num_tokens=int(starts[-1]),
    )
    hidden = torch.cat([text.hidden_TD[first : first + n] for _, _, text, first, n in rows])
    worker = runner.prompt_logprobs_worker
    return worker.compute_prompt_logprobs(
        head, hidden, batch, runner.all_token_ids, None, runner.prompt_lens
    )


def test_v2_prompts_in_chunks_beside_others_and_after_a_preemption():
    runner = v2_runner()
    tap, name = install(runner, vocab_size=V)
    a, b, other = Text(1, 20, ((1, 20),)), Text(2, 9, ((4, 9),)), Text(3, 9, ((1, 9),))
    v2_add(runner, "a", 5, a, a.ids_T)
    v2_add(runner, "other", 0, None, other.ids_T)
    assert v2_step(runner, [("a", 5, a, 0, 7), ("other", 0, other, 0, 9)]) == {}
    runner.prompt_logprobs_worker.remove_request("a")  # preempted, and begun again elsewhere
    v2_add(runner, "a", 3, a, a.ids_T)
    v2_add(runner, "b", 5, b, b.ids_T)
    v2_step(runner, [("b", 5, b, 0, 9), ("a", 3, a, 0, 12)])
    v2_step(runner, [("a", 3, a, 12, 8)])
    v2_step(runner, [("b", 5, b, 9, 1)])  # a decode step
    assert name == "v2"
    for text, answer in zip((a, b), answers_of(tap, [a, b]), strict=True):
        positions, signal, _ = text.expected()
        np.testing.assert_array_equal(answer.positions_S, positions)
        assert_same_signal(answer.signal, signal)
    assert runner.prompt_logprobs_worker.uses_prompt_logprobs.sum() == 0


def test_a_pipeline_stage_without_a_head_has_nothing_to_tap():
    runner = SimpleNamespace(prompt_logprobs_worker=None)
    tap, name = install(runner, vocab_size=V)
    text = Text(1, 5, ((1, 5),))
    assert name == "v2"
    assert len(answers_of(tap, [text])[0].positions_S) == 0


def test_the_installed_vllm_is_known():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    check_v1(GPUModelRunner)
    check_v2(PromptLogprobsWorker)
    assert "prompt_logprobs_worker" in RunnerV2.__init__.__code__.co_names


class OtherV1:
    def _get_prompt_logprobs_dict(self, hidden_states, scheduler_output):
        return {}


@pytest.mark.parametrize(
    ("runner", "got"), [(OtherV1(), "scheduler_output"), (object(), "no such")]
)
def test_another_shape_is_refused(runner, got):
    with pytest.raises(TeacherError, match=got):
        install(runner, vocab_size=V)
    with pytest.raises(TeacherError, match="add_request"):
        check_v2(object())
