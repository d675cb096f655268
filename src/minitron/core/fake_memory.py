"""The memory that code would take on tensors of real sizes, without the tensors.

In `fake_tensors` a tensor has shape, dtype and device, and no values: what is computed with it takes milliseconds and
no memory, and is counted as if it took memory.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron.core.device import DeviceType, planning_for


class Counted(TorchDispatchMode):
    """The bytes of the fake tensors that are alive, and the most that were alive since the last `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._bytes: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor

        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, FakeTensor) and value.device.type != "meta":
                self._see(value.untyped_storage())
        return out

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that has another size now, as gathered parameters have."""
        key = storage._cdata
        if key in self._bytes:
            self._count(storage.nbytes() - self._bytes[key])
            self._bytes[key] = storage.nbytes()

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self._count(storage.nbytes())
            weakref.finalize(storage, self._lose, key)

    def _lose(self, key: int) -> None:
        self.alive -= self._bytes.pop(key)

    def _count(self, more: int) -> None:
        self.alive += more
        self.peak = max(self.peak, self.alive)


@contextmanager
def fake_tensors(device: DeviceType) -> Iterator[Counted]:
    """In this block new tensors are fake, and their bytes are counted.

    They lie on the CPU, and code that does other things on a GPU does what it would do on a device of the type.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    counted, resize = Counted(), torch.UntypedStorage.resize_

    def counted_resize(self: torch.UntypedStorage, size: int) -> Tensor:
        done = resize(self, size)
        counted.resized(self)
        return done

    torch.UntypedStorage.resize_ = counted_resize  # type: ignore[assignment, method-assign]
    try:
        with planning_for(device), FakeTensorMode(allow_non_fake_inputs=True), counted:
            yield counted
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
