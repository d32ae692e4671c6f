"""The vllm teacher on vLLM's V2 model runner, whose Triton kernels an interpreter runs here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.teachers.vllm.conftest import ENGINE, running, some_samples
from tests.teachers.vllm.helpers import IGNORED_WARNINGS, assert_agree, count_preemptions

pytestmark = IGNORED_WARNINGS


@pytest.fixture(scope="module")
def teacher(teacher_options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "interpreter"), prepend=":")
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # its compiler would ask for Triton's
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setattr("vllm.config.vllm.HAS_TRITON", True)  # here, where no kernel runs
        with running(teacher_options(vllm=ENGINE | {"tensor_parallel_size": 2})) as teacher:
            yield teacher


@pytest.mark.parametrize(
    ("selection", "least", "audit_fraction"),
    [("topk:k=20", 0.999, 0.0), ("pps:tau=0.02", 0.99, 0.2)],
)
def test_answers_are_those_of_transformers(teacher, hf_teacher, selection, least, audit_fraction):
    preempted = count_preemptions(teacher)
    assert_agree(
        teacher,
        hf_teacher,
        some_samples()[::2],
        selection,
        least=least,
        audit_fraction=audit_fraction,
    )
    assert preempted()[0] > 10
    assert teacher.provenance()["runner"] == "v2"
