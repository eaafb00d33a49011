"""Small runs of one op's kernels, for compute-sanitizer: ``python -m benchmarks.gpu.sanitized OP``.
"""

from __future__ import annotations

import sys

import torch

from .cases import CASES, run

# Not sliced: beyond its end a slice has memory that is the program's own.
KINDS = ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last"))


def main() -> None:
    name, device = sys.argv[1:3]
    chosen = [case for case in CASES if case.op == name]
    if not chosen:
        sys.exit(f"no case of {name}")
    count = 0
    for case in chosen:
        for dtype, layout in KINDS[:1] if device == "cpu" else KINDS:
            dtype = dtype if dtype in case.dtypes else torch.float32
            floating, integer = case.inputs(device, dtype, layout)
            run(case, floating, integer, case.backend(device))
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} runs of {name}")


if __name__ == "__main__":
    main()
