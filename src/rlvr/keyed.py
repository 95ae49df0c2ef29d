"""Every random draw is keyed by what it is for, never by what was drawn before it.

So a run continues exactly after a kill, and neither ranks, batching nor the order of work changes what is
drawn. No global random state is read or written.
"""

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Return a generator that depends on its arguments alone, such as ``(seed, "order", pass_number)``."""
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence((seed, crc32(purpose.encode()), *keys)))
    )


def uniforms(seed: int, purpose: str, keys: Sequence[tuple[int, ...]], length: int) -> Tensor:
    """Uniform draws in [0, 1) for sampling: one row for every key, one column a token; [B, T] in float64."""
    draws = [generator(seed, purpose, *key).random(length) for key in keys]
    return torch.from_numpy(np.stack(draws)) if draws else torch.empty(0, length, dtype=torch.float64)


def integer(seed: int, purpose: str, *keys: int) -> int:
    """One draw from 0 to 2^63 - 1, to seed a generator that is not ours."""
    return int(generator(seed, purpose, *keys).integers(1 << 63))


def hashes(seed: int, purpose: str, *keys: Tensor | int) -> Tensor:
    """One draw for each combination of keys, for choices among tokens: a hash, not a generator for each.

    Args:
        seed: of the run.
        purpose: what is drawn.
        keys: whole numbers, or int64 tensors that broadcast to one shape.

    Returns:
        int64 over its whole range, in that shape, on the keys' device; equal only where all keys are, but
        for one chance in 2^64.
    """
    state = np.uint64(generator(seed, purpose).integers(1 << 63))
    device = next((key.device for key in keys if isinstance(key, Tensor)), torch.device("cpu"))
    mixed = np.asarray(state)
    with np.errstate(over="ignore"):  # sums and products are meant modulo 2^64
        for key in keys:
            number = key.cpu().numpy() if isinstance(key, Tensor) else np.asarray(key, dtype=np.int64)
            mixed = _mix(mixed ^ _mix(number.astype(np.uint64) + _ODD))
    return torch.from_numpy(np.ascontiguousarray(mixed).view(np.int64)).to(device)


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection in which every bit of the input moves half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
