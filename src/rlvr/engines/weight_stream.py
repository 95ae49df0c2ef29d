"""Weights from one process to others through a buffer of shared memory of fixed size."""

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of bytes of one tensor, where it lies in the buffer.

    Args:
        name: of the tensor.
        dtype: of the tensor.
        shape: of the tensor.
        begin: its first byte within the tensor.
        place: its first byte within the buffer.
        size: bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    place: int
    size: int


class WeightBuffer:
    """The sender's end: anonymous shared memory, which no kill can leave behind (Linux).

    It has two halves, so that one is filled while the other is read. A tensor larger than a half crosses in
    pieces: beyond the buffer nothing is copied but one tensor at a time, where its dtype changes.

    Args:
        size: bytes of both halves together.
    """

    def __init__(self, size: int = 128 << 20) -> None:
        self._half = size // 2
        self._file = os.memfd_create("rlvr-weights")
        os.ftruncate(self._file, 2 * self._half)
        self._map = mmap.mmap(self._file, 2 * self._half)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @property
    def path(self) -> str:
        """Where another process of the same user opens it, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def fill(
        self, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
    ) -> Iterator[list[Piece]]:
        """Fill the halves in turn with whole tensors or pieces of them.

        Args:
            weights: ``(name, full tensor)``, on any device.
            dtype: that floating tensors are cast to; None leaves them.

        Yields:
            What the half just filled holds. By the next ``next()`` the reader must be through with the half
            yielded before this one.
        """
        half, used, pieces = 0, 0, list[Piece]()
        for name, tensor in weights:
            tensor = tensor.detach()
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            data = tensor.contiguous().view(-1).view(torch.uint8)
            begin, whole = 0, False
            while not whole:
                if used == self._half:
                    yield pieces
                    half, used, pieces = 1 - half, 0, []
                size = min(len(data) - begin, self._half - used)
                place = half * self._half + used
                self._bytes[place : place + size].copy_(data[begin : begin + size])
                pieces.append(Piece(name, tensor.dtype, tuple(tensor.shape), begin, place, size))
                begin, used = begin + size, used + size
                whole = begin == len(data)
        if pieces:
            yield pieces

    def close(self) -> None:
        """Give the memory back once no reader holds it either."""
        if self._file >= 0:
            del self._bytes
            self._map.close()
            os.close(self._file)
            self._file = -1


class WeightReader:
    """A receiver's end.

    Args:
        path: of the sender's :class:`WeightBuffer`.
    """

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._unfinished: dict[str, Tensor] = {}

    def take(self, pieces: list[Piece]) -> Iterator[tuple[str, Tensor]]:
        """Copy pieces out of the buffer, and yield every tensor that is whole with them."""
        for piece in pieces:
            size = math.prod(piece.shape) * piece.dtype.itemsize
            if piece.begin == 0:
                self._unfinished[piece.name] = torch.empty(size, dtype=torch.uint8)
            data = self._unfinished[piece.name]
            end = piece.begin + piece.size
            data[piece.begin : end] = self._bytes[piece.place : piece.place + piece.size]
            if end == size:
                del self._unfinished[piece.name]
                yield piece.name, data.view(piece.dtype).view(piece.shape)
