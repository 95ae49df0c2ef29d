"""Rates and sizes of the machine that a run is planned for: stated, or measured on this one."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rlvr.errors import ConfigError, require_numbers

GIB = 2**30
SIZES = {"float32": 4, "bfloat16": 2, "float64": 8}
"""Bytes of a number by dtype."""


@dataclass(frozen=True)
class Hardware:
    """Rates and sizes of one device and of the node it is in; ``conf/hardware``.

    Args:
        name: for the table.
        accelerator: ``cuda`` or ``cpu``.
        devices: of a node, where ``trainer.devices=auto``.
        memory_gib: of one device, for a CPU of the machine.
        host_memory_gib: of a node.
        flops: peak operations a second by dtype of the arithmetic.
        memory_bytes_s: peak of the device's memory, bytes a second read and written.
        link_bytes_s: between the devices of a node, each direction.
        network_bytes_s: between nodes, a device's share.
        host_link_bytes_s: between a device and its host.
        host_memory_bytes_s: of a node's memory.
        compute_efficiency: share of the peak that a run reaches.
        memory_efficiency: the same of both memories.
        link_efficiency: the same of links and network.
        step_overhead_s: of one step of the engine, in seconds.
        usable: share of the memory that the counted parts may fill.

    Raises:
        ConfigError: for a rate or size that is not positive.
    """

    name: str
    accelerator: str
    devices: int
    memory_gib: float
    host_memory_gib: float
    flops: dict[str, float]
    memory_bytes_s: float
    link_bytes_s: float
    network_bytes_s: float
    host_link_bytes_s: float
    host_memory_bytes_s: float
    compute_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    link_efficiency: float = 1.0
    step_overhead_s: float = 0.0
    usable: float = 1.0

    def __post_init__(self) -> None:
        numbers = {
            name: value for name, value in vars(self).items() if name not in ("name", "accelerator", "flops")
        }
        numbers |= {f"flops.{name}": value for name, value in self.flops.items()}
        require_numbers("hardware", **numbers)
        for name, value in numbers.items():
            if value < 0 or (value == 0 and name != "step_overhead_s"):
                raise ConfigError(f"hardware.{name}={value}", "more than 0", f"~hardware.{name}")

    def rate(self, dtype: str) -> float:
        """Operations a second that a run reaches in ``dtype``."""
        if dtype not in self.flops:
            raise ConfigError(
                f"hardware.flops={self.flops}", f"a rate for {dtype}", f"+hardware.flops.{dtype}=1e12"
            )
        return self.flops[dtype] * self.compute_efficiency

    @property
    def memory_rate(self) -> float:
        """Bytes a second of the device's memory that a run reaches."""
        return self.memory_bytes_s * self.memory_efficiency


def this_cpu(size: int = 512, repeat: int = 20) -> Hardware:
    """This machine's CPU, its rates measured on torch's present number of threads.

    Args:
        size: rows and columns of the matrices multiplied.
        repeat: of which the fastest counts: each is short, so that on a busy machine one runs undisturbed.
    """

    def best(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeat):
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    flops = {}
    for name in SIZES:
        left, right = (torch.rand(size, size).to(getattr(torch, name)) for _ in range(2))
        flops[name] = 2 * size**3 / best(partial(torch.mm, left, right))
    source = torch.ones(16 << 20)  # 64 MiB, more than caches hold
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / best(partial(target.copy_, source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Hardware(
        name=f"this CPU, {torch.get_num_threads()} threads",
        accelerator="cpu",
        devices=1,
        memory_gib=memory,
        host_memory_gib=memory,
        flops=flops,
        memory_bytes_s=copied,
        link_bytes_s=copied,
        network_bytes_s=copied,
        host_link_bytes_s=copied,
        host_memory_bytes_s=copied,
    )
