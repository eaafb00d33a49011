"""One rule for seeds that depend on several numbers."""

from __future__ import annotations

import numpy as np


def derived_seed(*numbers: int) -> int:
    """A seed below 2⁶³ from whole numbers of at least 0; near ones give unrelated seeds.

    Example:
        >>> derived_seed(0, 1) != derived_seed(1, 0)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
