"""A process group of its own between a trainer and servers: neither has to be in the other's world.

The construction is SGLang's (`init_custom_process_group`), so that a trainer that uses this file and a server that
runs SGLang meet: a TCP store at the address of rank 0, keys prefixed with the name of the group.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    ProcessGroup,
    _new_process_group_helper,
    _world,
    rendezvous,
)


def join_group(
    address: str, port: int, rank: int, world_size: int, name: str, backend: str, timeout_s: float
) -> ProcessGroup:
    """Join a group and return it when all members are there. Collective over the group.

    Args:
        address: of rank 0, which opens `port` there.
        name: unique in this process; the same for all members.
        backend: `nccl` or `gloo`.
        timeout_s: deadline of joining, and of each later collective of the group.

    Raises:
        ValueError: the arguments cannot be, or the name is in use.
        RuntimeError: not all members came in time (`torch.distributed.DistError` and its kin).
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: must lie in [0, {world_size}), the size of group {name!r}")
    if name in _world.pg_names.values():
        raise ValueError(f"group {name!r} exists already; leave it or choose another name")
    timeout = timedelta(seconds=timeout_s)
    host = f"[{address}]" if ":" in address else address
    store, _, _ = next(rendezvous(f"tcp://{host}:{port}", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def leave_group(group: ProcessGroup) -> None:
    """Leave a group; needs nobody else."""
    dist.destroy_process_group(group)
