"""The instruction sets that native kernels are compiled for, one after the other."""

import pytest

from ufbert.ops import native
from ufbert.ops.native import build


@pytest.fixture(params=list(build.INSTRUCTION_SETS))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each instruction set that this processor has; kernels use it during the test."""
    assert not native.unavailable(), native.unavailable()  # in the environment as it was, and known to XLA from here on
    monkeypatch.setenv("UFBERT_ISA", request.param)
    if not native.instruction_set():
        pytest.skip(
            f"this processor lacks {request.param}; the same text, compiled for those it has, fails in its stead"
        )
    return request.param
