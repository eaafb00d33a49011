"""A network's constants (packed and cast weights, statistics as scale and shift), made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..ops.content_digest.stamp import Stamp
from ..runtime.constants import Store, using


class Prepared:
    """What a network in eval mode computes from its weights alone is kept between calls.

    Args:
        network: whose calls run inside :meth:`checked` or :meth:`vouched`.

    Example:
        >>> import torch
        >>> from smis_kernels import SPADE
        >>> norm, x = SPADE(8, 4).eval(), torch.randn(1, 8, 16, 16)
        >>> labels = torch.rand(1, 4, 16, 16)
        >>> prepared = Prepared(norm)
        >>> with prepared.checked(), torch.no_grad():
        ...     y = norm(x, labels)
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._stamp: Stamp | None = None
        self._store: Store | None = None

    def __getstate__(self) -> dict[str, Any]:  # constants are known by where their sources lie
        return {"_network": self._network, "_stamp": None, "_store": None}

    def _tensors(self) -> list[Tensor]:
        return [*self._network.parameters(), *self._network.buffers()]

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Keep constants while the content of all weights is what it was: each entry looks.

        It reads the weights once, and waits for a GPU's. In training nothing is kept.
        """
        if any(module.training for module in self._network.modules()):
            self._stamp = self._store = None
        else:
            tensors = self._tensors()
            if self._stamp is None or not self._stamp.holds(tensors):
                self._stamp, self._store = Stamp(tensors), Store(tensors)
        with using(self._store):
            yield

    @contextmanager
    def vouched(self) -> Iterator[None]:
        """Keep constants without a look at the content: the caller knows that it has not changed.

        Writes that move a version, other dtypes and other memory are seen here too.
        """
        if self._store is None:
            self._store = Store(self._tensors())
        with using(self._store):
            yield
