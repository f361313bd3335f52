"""Lines as NCCL writes them, of made-up jobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nemo_megacpp.layout import ParallelLayout
from nemo_megacpp.layout.placement import group_of, group_size

_KINDS = ("world", "tp", "cp", "pp", "dp", "ep", "tp-cp")


def log_of(layout: ParallelLayout, hosts: Sequence[str], kinds: Iterable[str] = _KINDS) -> str:
    """Return the log of a job whose rank ``r`` runs on ``hosts[r]``."""
    lines = ["nemo: starting", "node0:99:99 [0] NCCL INFO NCCL version 2.27.3+cuda12.9"]
    groups = [
        ranks
        for kind in kinds
        if group_size(layout, kind) > 1
        for ranks in dict.fromkeys(group_of(layout, rank, kind) for rank in range(layout.world))
    ]
    for number, ranks in enumerate(groups):
        for place, rank in enumerate(ranks):
            device = rank % 8
            head = f"{hosts[rank]}:{1000 + rank}:{2000 + rank} [{device}] NCCL INFO"
            member = (
                f"comm 0x55d8ac4ad{rank:03x} rank {place} nranks {len(ranks)} cudaDev {device} "
                f"nvmlDev {device} busId {device + 1:x}000 commId 0x9ad9b5e4{number:08x}"
            )
            after = ranks[(place + 1) % len(ranks)]
            via = "P2P/CUMEM" if hosts[after] == hosts[rank] else "NET/IB/0(1)/GDRDMA"
            lines += [
                f"{rank}: {head} ncclCommInitRankConfig {member} - Init START",
                f"{head} Channel 00/0 : {place}[{device}] -> {(place + 1) % len(ranks)}[{device}] "
                f"{'[send] ' if 'NET' in via else ''}via {via}",
                f"{head} ncclCommInitRankConfig {member} - Init COMPLETE",
            ]
    return "\n".join(lines) + "\n"
