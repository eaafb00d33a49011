"""Small runs of one op's kernels, for compute-sanitizer: ``python -m benchmarks.gpu.sanitized OP``.
"""

from __future__ import annotations

import sys

import torch

from .cases import CASES, run

LAYOUTS = ("contiguous", "channels_last", "sliced")


def main() -> None:
    name, device = sys.argv[1:3]
    chosen = [case for case in CASES if case.op == name]
    if not chosen:
        sys.exit(f"no case of {name}")
    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16)
    count = 0
    for case in chosen:
        for dtype in dtypes:
            for layout in LAYOUTS[:1] if device == "cpu" else LAYOUTS:
                if dtype not in case.dtypes:
                    continue
                floating, integer = case.inputs(device, dtype, layout)
                run(case, floating, integer, case.backend(device))
                count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} runs of {name}")


if __name__ == "__main__":
    main()
