"""Every op runs on the backend that was asked for, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import PUBLIC

from smis_kernels import BackendError, explain, use_backend
from smis_kernels.runtime import backend as selector
from smis_kernels.runtime.backend import missing, requested, resolve

needs_cpu = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))


@pytest.mark.parametrize("name", PUBLIC)
def test_an_absent_backend_raises(name: str) -> None:
    call: Callable[..., Any] = PUBLIC[name]
    for kind in ("cuda", "triton"):
        with pytest.raises(BackendError, match="backend: "):
            call(backend=kind)
        with use_backend(kind), pytest.raises(BackendError, match="backend: "):
            call()
    with pytest.raises(ValueError, match="backend: expected one of auto, reference"):
        call(backend="gpu")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_missing_library_is_no_silent_fallback(name: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "missing",
                        lambda kind, device=None: "it was not built; cure: build it")
    monkeypatch.setattr(selector, "_warned", set())
    with pytest.raises(BackendError, match="cannot run: it was not built"):
        PUBLIC[name](backend="cpu")
    with pytest.warns(UserWarning, match="runs on the reference path: it was not built"):
        PUBLIC[name]()


# These tell explain nothing of their own: the modules that call them do.
INNER = {"window_table", "window_embedding", "number_vectors", "number_windows", "label_conv"}


@needs_cpu
@pytest.mark.parametrize("name", sorted(set(PUBLIC) - INNER))
def test_the_backend_that_runs_is_the_one_named(name: str) -> None:
    for asked, ran in (("cpu", "cpu"), ("reference", "reference"), (None, "cpu")):
        given = {} if asked is None else {"backend": asked}
        choices = explain(PUBLIC[name], **given).choices
        assert choices and {choice.backend for choice in choices} == {ran}, asked
    with use_backend("reference"):
        assert {c.backend for c in explain(PUBLIC[name]).choices} == {"reference"}
        assert {c.backend for c in explain(PUBLIC[name], backend="cpu").choices} == {"cpu"}


def test_the_argument_comes_first_then_the_block_then_the_environment(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "_environment", "reference")
    assert requested() == "reference"
    with use_backend("cpu"):
        assert requested() == "cpu"
        assert requested("auto") == "auto"
        with use_backend("reference"):
            assert requested() == "reference"
        assert requested() == "cpu"
    assert requested() == "reference"
    monkeypatch.setattr(selector, "_environment", "fast")
    with pytest.raises(ValueError, match="SMIS_BACKEND: expected one of"):
        resolve("op", torch.zeros(1), None, ("cpu",))


def test_interpreted_triton_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=r"needs a CUDA tensor \(or TRITON_INTERPRET=1\)"):
        resolve("op", torch.zeros(1), "triton", ("cpu", "triton"))
    with pytest.raises(BackendError, match="needs a cpu tensor, got one on meta"):
        resolve("op", torch.zeros(1, device="meta"), "cpu", ("cpu",))
    assert resolve("op", torch.zeros(1, device="meta"), None, ("cpu",)) == "reference"
