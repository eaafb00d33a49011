"""Calls recorded as CUDA graphs, and what must hold for a replay to stand for its call."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import constants
from .backend import requested
from .derivatives import transformed
from .explain import recording
from .path import requested_path
from .tensors import capturing

WARM_UPS = 3  # cuDNN's choice of algorithms and Triton's compilation cannot be captured
_alone = threading.Lock()  # torch captures on one stream, whoever asks
_broken: list[Any] = []  # graphs whose capture failed: torch's allocator may ask for them later


class _Own(threading.local):
    capturing = False


_own = _Own()


def capture(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A replay of ``call`` from a CUDA graph; its result lies in memory that each replay reuses.

    Raises:
        RuntimeError: the call cannot be captured; what it raised, or CUDA.
    """
    with _alone, torch.cuda.device(device):
        current = torch.cuda.current_stream(device)
        _own.capturing = True
        try:
            graph, out = _captured(call, device, current)
        finally:
            _own.capturing = False

    def replay() -> Any:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


def _captured(call: Callable[[], Any], device: torch.device, current: Any) -> tuple[Any, Any]:
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: allocations of other threads (a data loader's) do not break the capture
        # on a stream of this device: torch's own is of the first that was captured on
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            out = call()
    except BaseException:
        _broken.append(graph)
        torch.cuda.set_stream(current)  # which torch leaves where the end of a capture raises
        raise
    return graph, out


def circumstances(device: torch.device) -> tuple[Hashable, ...] | None:
    """What decides how a call runs beside its inputs and weights; None where none is replayed.

    A call with gradients, under autocast or a mode of torch's dispatch, inside ``explain``, a
    compiler, a transform, a capture or another's constants is itself, and no replay.
    """
    functions = _get_current_function_mode_stack()
    if (
        torch.is_grad_enabled() or torch.is_autocast_enabled(device.type) or recording()
        or torch.compiler.is_compiling() or transformed() is not None or _own.capturing
        or constants.scope() is not None or torch._C._len_torch_dispatch_stack() > 0
        or any(type(mode) is not DeviceContext for mode in functions)
        or capturing(device)
    ):
        return None
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None,
        requested(), requested_path(), torch.is_inference_mode_enabled(),
        torch.get_default_dtype(), *(str(mode.device) for mode in functions),
        torch.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.benchmark,
        cudnn.deterministic, cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        matmul.fp32_precision, matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        getattr(matmul, "allow_fp16_accumulation", None),
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )


def difference(replayed: Sequence[Tensor], called: Sequence[Tensor],
               again: Callable[[], Sequence[Tensor]]) -> str | None:
    """How a replay differs from the call that it stands for; None where it does not.

    Both are equal bit for bit (NaN equals NaN), or as near as the call is to itself: ``again``
    makes it a second time where they are not.
    """
    error = max(map(apart, replayed, called), default=0.0)
    if error == 0:
        return None
    noise = max(map(apart, again(), called), default=0.0)
    if error <= 2 * noise and math.isfinite(error):
        return None
    return f"a replay is {error:.2g} from the call, two calls are {noise:.2g} apart"


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite between a number and NaN, and between shapes or dtypes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    same = (a == b) | ((a != a) & (b != b))
    error = torch.where(same, 0.0, (a.double() - b.double()).abs()).nan_to_num(nan=math.inf)
    return float(error.max())
