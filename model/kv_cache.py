"""Keys and values of the positions so far: one slab for all layers, allocated once."""

import torch
from torch import Tensor

from kinetok.errors import UserError


class KVCache:
    """Slab ``[2, layers, B, H, capacity, hd]``; ``lengths`` counts the positions in use of each row."""

    def __init__(self, shape: tuple[int, int, int, int, int], *, device: torch.device, dtype: torch.dtype) -> None:
        self.slab = torch.zeros((2, *shape), device=device, dtype=dtype)
        self.lengths = [0] * shape[1]
        self._reach = 0

    @property
    def capacity(self) -> int:
        return self.slab.shape[4]

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the first positions of a layer from ``k, v [B, H, T, hd]``; padding is overwritten by what follows."""
        self.slab[0, layer, :, :, : k.shape[2]] = k
        self.slab[1, layer, :, :, : v.shape[2]] = v

    def advance(self) -> tuple[Tensor, Tensor | None]:
        """Make room for one position in every row.

        Returns the new positions ``[B]`` and which keys each row sees ``[B, 1, 1, S]`` (None where all rows see all).
        """
        if max(self.lengths) >= self.capacity:
            raise UserError(f"the cache holds {self.capacity} positions and is full")
        at = torch.tensor(self.lengths, device=self.slab.device)
        self.lengths = [length + 1 for length in self.lengths]
        self._reach = max(self.lengths)
        if min(self.lengths) == self._reach:
            return at, None
        keys = torch.arange(self._reach, device=self.slab.device)
        return at, (keys <= at[:, None])[:, None, None]

    def append(self, layer: int, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k, v [B, H, 1, hd]`` at the positions ``at``; returns all keys and values so far ``[B, H, S, hd]``."""
        keys, values = self.slab[0, layer], self.slab[1, layer]
        rows = torch.arange(len(at), device=at.device)
        keys[rows, :, at] = k[:, :, 0]
        values[rows, :, at] = v[:, :, 0]
        return keys[:, :, : self._reach], values[:, :, : self._reach]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.slab = self.slab[:, :, rows]
        self.lengths = [self.lengths[row] for row in rows]
