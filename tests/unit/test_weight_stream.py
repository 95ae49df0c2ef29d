"""Weights through shared memory: whole, in pieces, cast, to another process."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rlvr.engines.weight_stream import WeightBuffer, WeightReader

TENSORS = [
    ("a", torch.arange(5.0)),
    ("b", torch.arange(24.0).view(4, 6).t()),  # not contiguous
    ("c", torch.tensor([7], dtype=torch.int64)),
    ("d", torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).bfloat16()),
    ("empty", torch.zeros(0, 3)),
    ("e", torch.tensor(2.5)),
]


@pytest.fixture
def buffer(request: pytest.FixtureRequest) -> Iterator[WeightBuffer]:
    buffer = WeightBuffer(request.param)
    yield buffer
    buffer.close()


@pytest.mark.parametrize("buffer", [16, 34, 64, 100, 4096], indirect=True)
def test_every_tensor_arrives_whole(buffer: WeightBuffer) -> None:
    """Also those larger than a half; what was yielded stays when the buffer is filled again."""
    reader = WeightReader(buffer.path)
    arrived = [item for pieces in buffer.fill(TENSORS) for item in reader.take(pieces)]
    assert [name for name, _ in arrived] == [name for name, _ in TENSORS]
    for (_, sent), (_, got) in zip(TENSORS, arrived, strict=True):
        assert got.dtype == sent.dtype
        assert torch.equal(got, sent)


@pytest.mark.parametrize("buffer", [64], indirect=True)
def test_one_half_is_read_while_the_other_is_filled(buffer: WeightBuffer) -> None:
    """A reader one step behind sees what was sent."""
    reader = WeightReader(buffer.path)
    arrived: dict[str, Tensor] = {}
    behind = None
    for pieces in buffer.fill(TENSORS):
        if behind is not None:
            arrived.update(reader.take(behind))
        behind = pieces
    assert behind is not None
    arrived.update(reader.take(behind))
    assert all(torch.equal(arrived[name], tensor) for name, tensor in TENSORS)


@pytest.mark.parametrize("buffer", [4096], indirect=True)
def test_floating_tensors_are_cast(buffer: WeightBuffer) -> None:
    reader = WeightReader(buffer.path)
    arrived = dict(item for pieces in buffer.fill(TENSORS, torch.bfloat16) for item in reader.take(pieces))
    assert arrived["a"].dtype == torch.bfloat16
    assert arrived["c"].dtype == torch.int64


READER = """
import sys, torch
from rlvr.engines.weight_stream import Piece, WeightReader
piece = Piece("a", torch.float32, (5,), 0, 0, 20)
print(dict(WeightReader(sys.argv[1]).take([piece]))["a"].tolist())
"""


@pytest.mark.parametrize("buffer", [4096], indirect=True)
def test_another_process_reads_it(buffer: WeightBuffer) -> None:
    next(buffer.fill(TENSORS[:1]))
    read = subprocess.run(
        [sys.executable, "-c", READER, buffer.path], capture_output=True, text=True, check=True, timeout=60
    )
    assert read.stdout.strip() == str([0.0, 1.0, 2.0, 3.0, 4.0])
