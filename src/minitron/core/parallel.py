"""Several processes that work on one job, as torchrun starts them. The only module that uses torch.distributed.

The processes work in step: before each exchange and at the end, every process reports whether it has failed. So an
error in one process ends all of them, and no process waits for another that has left.
"""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the process group at the time of import as default arguments. If transformers imported it during a
# job, they would keep that group, and its threads would crash the process at exit.
import torch.distributed.nn.functional
from jaxtyping import Int
from torch import Tensor, nn

from minitron.core.errors import RunError
from minitron.core.interrupts import signals_held
from minitron.core.watchdog import Watchdog

# The first process may tokenize for hours while the others wait for it.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """The number of a process in its job, and the number of processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes on this machine

    def share(self, num_samples: int, batch: int) -> slice:
        """The samples of this process: consecutive whole batches, which do not depend on the number of processes."""
        num_batches = -(-num_samples // batch)
        start, stop = (num_batches * rank // self.size * batch for rank in (self.rank, self.rank + 1))
        return slice(start, min(stop, num_samples))


# Whether the processes exchange parts of layers, when no error can be passed on.
_computing = False
# Whether the connection to the others has broken.
_lost = False
# Whether this process works alone for a while.
_alone = False
# What ends the processes when one of them does not answer, while they compute together.
_watchdog: Watchdog | None = None
# What this process pretends to be, for a plan.
_pretended: Ranks | None = None


class _OtherFailed(RunError):
    """The error of another process, with its message."""


def ranks() -> Ranks:
    """This process by the environment variables of torchrun; without them it is alone."""
    if _pretended is not None:
        return _pretended
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    return Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def joined() -> Ranks:
    """This process in its `process_group`; without a group it is alone."""
    return ranks() if _together() else Ranks()


def is_first() -> bool:
    """Whether this process is the first of its group, or alone."""
    return joined().rank == 0


def _together() -> bool:
    return dist.is_initialized() and not _alone


@contextmanager
def alone() -> Iterator[None]:
    """In this block the process works as if it were alone; the others must wait for it outside, as in `agreed`."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def process_group() -> Iterator[Ranks]:
    """In this block the processes of the job can exchange tensors, and each has its own GPU where there are GPUs.

    Raises: RunError with the message of another process that failed.
    """
    here = ranks()
    if here.size == 1:
        yield here
        return
    import torch.distributed.fsdp  # seconds, and like the import above not in the middle of a job

    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield here
        require_all_well()
    except Exception as error:
        if _is_loss(error):
            raise _loss(error) from None
        if _computing or _lost:
            raise  # the others may wait inside a layer: torchrun ends them after this process has left
        with suppress(RuntimeError):  # the others have left already
            if not isinstance(error, _OtherFailed):
                with suppress(_OtherFailed):  # another process failed at the same time
                    _exchange_failure(str(error) or type(error).__name__)
            # Leave together: torchrun ends the others after one has left, and the first has yet to print the message.
            dist.all_reduce(torch.zeros(1))
        raise
    finally:
        with signals_held():
            # Divided modules, which are full of cycles, hold the group: its threads must not outlive it.
            _mesh.cache_clear()
            gc.collect()
            dist.destroy_process_group()


@contextmanager
def pretended(size: int) -> Iterator[None]:
    """In this block the process is the first of so many, which exchange nothing: to see what a job would take.

    Raises: RunError in a process that belongs to a job already.
    """
    global _pretended
    if size == 1:
        yield
        return
    if dist.is_initialized():
        raise RunError("one process alone can plan for several: run the same command without torchrun")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend that exchanges nothing

    _pretended = Ranks(0, size, 0)
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        _mesh("cpu")  # of real tensors, before any are fake
        yield
    finally:
        _pretended = None
        _mesh.cache_clear()
        gc.collect()
        dist.destroy_process_group()


@cache
def _mesh(device_type: str) -> Any:
    """All processes of the group in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (dist.get_world_size(),))


def shard(root: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Shard a module's parameters among the processes (FSDP2); without a process group nothing changes.

    Each block is gathered while it runs, and parameters outside the blocks while the root runs. The gradients of all
    processes are added.

    Args:
        dtype: the dtype in which the blocks' parameters are gathered; gradients are added in float32.
    """
    if not _together():
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = _mesh(device.type)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
    # The root is sharded again after its forward, so that parameters seen from outside are those of the optimizer.
    sums = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(root, mesh=mesh, reshard_after_forward=True, mp_policy=sums)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # A sum instead of a mean, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def fill(module: nn.Module, read: Callable[[str, int, int], Tensor], device: torch.device) -> None:
    """Read the values of a module's parameters; of sharded parameters each process reads only its own rows.

    Args:
        read: returns the rows [start, stop) of the parameter of a name, in any dtype.
    """
    filled: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for name, empty in [*module.named_parameters(remove_duplicate=False)]:
        if id(empty) not in filled:
            values = torch.empty(local_shard(empty).shape, dtype=empty.dtype, device=device)
            start = _first_row(empty.data)
            if len(values):
                values.copy_(read(name, start, start + len(values)))
            filled[id(empty)] = empty, nn.Parameter(_with_part(empty.data, values), requires_grad=empty.requires_grad)
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, filled[id(empty)][1])
    require_all_well()


def _first_row(tensor: Tensor) -> int:
    """The first row of this process's shard of a tensor; 0 if the tensor is not sharded."""
    if not _together():
        return 0
    from torch.distributed.tensor import DTensor

    here = joined()
    return min(here.rank * -(-len(tensor) // here.size), len(tensor)) if isinstance(tensor, DTensor) else 0


def _with_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor that is sharded like another, with `part` as the shard of this process."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return part
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must call this."""
    if not _together():
        return tensor
    from torch.distributed.tensor import DTensor

    _count_exchange()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _count_exchange() -> None:
    if _watchdog is not None:
        _watchdog.count()


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, as a view; the tensor itself if it is not sharded."""
    if not _together():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(values: Tensor, tensor: Tensor) -> Tensor:
    """The rows of `values`, which are for the whole of a tensor, that belong to this process's shard."""
    start = _first_row(tensor)
    return values[start : start + len(local_shard(tensor))]


def at_owner(values: Tensor, owner: int) -> Tensor:
    """A tensor that only the process `owner` has: the values there, an empty tensor on the meta device elsewhere."""
    return values if joined().rank == owner else values.to("meta")


def from_owner(values: Tensor, owner: int, device: torch.device) -> Tensor:
    """Broadcast a tensor of `at_owner` to all processes; every process must call this."""
    if not _together():
        return values
    if values.is_meta:
        values = torch.empty_like(values, device=device)
    dist.broadcast(values, owner)
    return values


def shard_like(values: Tensor, tensor: Tensor) -> Tensor:
    """Shard values among the processes as the tensor is sharded."""
    if not _together():
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    return distribute_tensor(values, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else values


def any_of(*flags: bool) -> list[bool]:
    """Whether each flag is set in any process."""
    raised = torch.tensor([float(flag) for flag in flags])
    all_reduce_sum(raised)
    return [value > 0 for value in raised.tolist()]


@contextmanager
def computing_together() -> Iterator[None]:
    """In this block the processes run sharded modules: an error in one of them ends the job with its message.

    So does a process that does not answer for minutes, see `Watchdog`.
    """
    global _computing, _watchdog
    if not _together():
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    _computing = True
    with Watchdog(store, dist.get_rank(), dist.get_world_size()) as _watchdog:
        try:
            yield
        finally:
            _watchdog = None
    _computing = False


@contextmanager
def awaited() -> Iterator[None]:
    """In this block the process does what the others wait for, and may take long."""
    if _watchdog is None:
        yield
        return
    with _watchdog.busy():
        yield


def is_alone() -> bool:
    """Whether the others cannot be told of an error: they run sharded modules together, or a connection broke."""
    return _computing or _lost


def require_all_well() -> None:
    """Wait for the other processes.

    Raises: RunError with the message of a process that failed.
    """
    if _together() and _pretended is None:
        _count_exchange()
        with _loss_as_error():
            _exchange_failure(None)


def all_reduce_sum(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the processes."""
    require_all_well()
    if _together():
        with _loss_as_error():
            dist.all_reduce(tensor)


def broadcast(matrix: Int[Tensor, "rows columns"] | None) -> Int[Tensor, "rows columns"]:
    """Send an int64 matrix from the first process to the others, which pass None."""
    require_all_well()
    if not _together():
        assert matrix is not None
        return matrix
    with _loss_as_error():
        return _send(matrix, source=0)


def agreed(value: Any) -> Any:
    """The first process's value, of JSON types, in all processes."""
    text = torch.tensor([[*json.dumps(value).encode()]]) if is_first() else None
    return value if not _together() else json.loads(bytes(broadcast(text)[0].tolist()))


def _exchange_failure(message: str | None) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    first_failed = torch.tensor(size if message is None else rank)
    dist.all_reduce(first_failed, dist.ReduceOp.MIN)
    source = int(first_failed)
    if source < size:
        text = _send(torch.tensor([[*(message or "").encode()]]) if source == rank else None, source)
        if source != rank:
            raise _OtherFailed(bytes(text[0].tolist()).decode())


def _send(matrix: Tensor | None, source: int) -> Tensor:
    shape = torch.zeros(2, dtype=torch.int64) if matrix is None else torch.tensor(matrix.shape)
    dist.broadcast(shape, source)
    matrix = torch.empty(shape.tolist(), dtype=torch.int64) if matrix is None else matrix.contiguous()
    dist.broadcast(matrix, source)
    return matrix


@contextmanager
def _loss_as_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # raised by torch.distributed when a connection breaks
        raise _loss(error) from None


def _is_loss(error: Exception) -> bool:
    """Whether an error means that a connection broke; errors of gloo are only known by their text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _loss(error: Exception) -> RunError:
    global _lost
    _lost = True
    number, reason = dist.get_world_size(), str(error).partition("] ")[2].partition(". ")[0] or str(error)
    return _OtherFailed(f"another of the {number} processes was ended; run the same command to go on ({reason})")
