"""Training on many devices and machines: PyTorch's own engine, in processes that torchrun starts.

Each process is a rank. All read the same tokens and checkpoints from disk, each trains on its own
share of every step's windows, and the first one writes and talks; where the ranks share the
optimizers' state, each writes its own. Of a process that torchrun did not start there is one rank,
and nothing here costs it anything.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, MissingExtraError

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel
except ImportError as error:
    raise MissingExtraError(error.name or "torch", "train") from error

from .model import Llama


@dataclass(frozen=True)
class Writers:
    """Those who write a checkpoint, each a share of it, seen from one of them.

    They talk apart from the training, whose messages their ``group`` does not meet: by gloo, from
    threads that write while it goes on.
    """

    rank: int
    count: int
    group: dist.ProcessGroup | None

    def tell(self, text: str) -> list[str]:
        """What each of them tells, in their order; all have to, and wait for each other."""
        if self.group is None:
            return [text]
        texts = [""] * self.count
        dist.all_gather_object(texts, text, group=self.group)
        return texts

    def file_names(self, name: str) -> list[str]:
        """What the share of each is called: as Hugging Face names the parts of a file."""
        if self.count == 1:
            return [name]
        stem, suffix = name.split(".")
        return [f"{stem}-{i + 1:05d}-of-{self.count:05d}.{suffix}" for i in range(self.count)]


# Where the first rank has all that is to be written.
ALONE = Writers(0, 1, None)


class Ranks:
    """The processes that train one model together, seen from one of them."""

    def __init__(self, device: torch.device) -> None:
        """Join the others, if torchrun started this process: by nccl on GPUs, else by gloo."""
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if device.type == "cuda" and self.count > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self.writers = ALONE

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this is the first rank of its machine."""
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    def share(self, n_windows: int) -> range:
        """Which of a step's windows this rank trains on: as many as every other.

        Raises ConfigError when they cannot be shared evenly.
        """
        if n_windows % self.count:
            raise ConfigError(
                f"batch_size × grad_accum is {n_windows}, which {self.count} processes cannot share"
                " evenly"
            )
        n = n_windows // self.count
        return range(self.rank * n, (self.rank + 1) * n)

    def seed(self, seed: int, step: int) -> int:
        """The seed of this rank's dropout at a step: no two are alike."""
        return int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)[0])

    def spread(self, model: Llama, parallel: str) -> nn.Module:
        """``model`` as it is to be called: with "ddp" every rank has it whole, with "fsdp" each
        keeps a share of every tensor (layer by layer; ``model`` itself is changed)."""
        if self.count == 1:
            return model
        if parallel == "ddp":
            with warnings.catch_warnings():  # of a new name, which older torch does not know
                warnings.simplefilter("ignore", FutureWarning)
                return DistributedDataParallel(model, broadcast_buffers=False)
        mesh = init_device_mesh(self.device.type, (self.count,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.writers = Writers(self.rank, self.count, dist.new_group(backend="gloo"))
        return model

    def gradients(self, network: nn.Module, complete: bool) -> AbstractContextManager[object]:
        """The context of a forward and backward pass; the ranks' gradients are put together only
        where those of the step are ``complete``."""
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(complete)
        elif isinstance(network, DistributedDataParallel) and not complete:
            return network.no_sync()
        return nullcontext()

    def sum(self, *values: float) -> list[float]:
        """Of each value the sum over all ranks."""
        if self.count == 1:
            return [float(value) for value in values]
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        sums = torch.tensor(values, dtype=kind, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank has a share: all of them have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor) -> Tensor:
    """Of a tensor that the ranks share this one's rows, on its device; any other as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.redistribute(placements=[Shard(0)]).to_local()


def together(shares: list[Tensor]) -> Tensor:
    """A tensor from the rows of it that each rank had, in their order."""
    return shares[0] if len(shares) == 1 else torch.cat(shares)


def shared_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every rank has whole, kept as ``parameter`` is: by shares, on its device."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def leave() -> None:
    """Part from the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
