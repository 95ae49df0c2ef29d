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
