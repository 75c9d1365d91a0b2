"""How keys and values lie in a block of vLLM's paged CPU cache: learned from its own writer, not assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.errors import BackendError

DIGIT = 256  # whole numbers below it are exact in every dtype
Writer = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # keys, values [T, H, D], cache, slots [T]


@dataclass(frozen=True)
class BlockLayout:
    """Of one block and head, block_size x D numbers each of keys and values.

    keys, values: "rows" = as [block_size, D], "columns" = as [D, block_size], or [block_size * D] int64, where each
    number of the first form lies.
    """

    keys: Tensor | str
    values: Tensor | str

    @property
    def is_plain(self) -> bool:
        """Whether it is that of `kvzip.backends.native.attend_paged`."""
        return self.keys == "columns" and self.values == "rows"

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, H, n * block_size, D] of blocks [R, n] of a cache [N, H, block_size, 2 * D]; copies."""
        size, dim = cache.shape[2], cache.shape[3] // 2
        flat = cache.view(*cache.shape[:2], 2, size * dim)
        keys, values = (
            _in_rows(flat[:, :, which][blocks], layout, size, dim)
            for which, layout in enumerate((self.keys, self.values))
        )
        return keys, values


def _in_rows(found: Tensor, layout: Tensor | str, size: int, dim: int) -> Tensor:
    """[R, n, H, size * dim] as they lie -> [R, H, n * size, dim]."""
    if isinstance(layout, Tensor):
        found = found[..., layout]
    elif layout == "columns":
        found = found.view(*found.shape[:-1], dim, size).transpose(-1, -2)
    rows = found if found.dim() == 5 else found.view(*found.shape[:-1], size, dim)
    return rows.transpose(1, 2).flatten(2, 3).contiguous()


def learn_layout(writer: Writer, num_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> BlockLayout:
    """Write numbered keys and values and see where they lie. Raises BackendError where these do not stay in place."""
    count = block_size * head_dim
    digits = [torch.arange(count) % DIGIT, torch.arange(count) // DIGIT]
    assert count <= DIGIT**2
    found = [_written(writer, digit, num_heads, block_size, head_dim, dtype) for digit in digits]
    keys, values = (low + DIGIT * high for low, high in zip(*found, strict=True))
    return BlockLayout(_named(keys, block_size, head_dim), _named(values, block_size, head_dim))


def _written(
    writer: Writer, numbers: Tensor, num_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What lies where keys and values are [block_size * D] int64 each, once `numbers` were written as both."""
    cache = torch.full((2, num_heads, block_size, 2 * head_dim), -1.0, dtype=dtype)
    rows = numbers.view(block_size, 1, head_dim).expand(-1, num_heads, -1).to(dtype).contiguous()
    writer(rows, rows.clone(), cache, torch.arange(block_size, 2 * block_size))
    parts = cache.view(2, num_heads, 2, -1)
    if not bool((parts[0] == -1).all() & (parts[1] == parts[1, :1]).all()):
        raise BackendError("vLLM's cache does not keep a head's keys in its block: this build is not supported")
    return parts[1, 0, 0].long(), parts[1, 0, 1].long()


def _named(lies: Tensor, size: int, dim: int) -> Tensor | str:
    """lies: [size * dim], the number that stands at each place."""
    count = torch.arange(size * dim)
    if torch.equal(lies, count):
        return "rows"
    if torch.equal(lies, count.view(size, dim).T.flatten()):
        return "columns"
    places = lies.argsort()
    if not torch.equal(lies[places], count):
        raise BackendError("vLLM's cache stores keys in a form that can't be read back: this build is not supported")
    return places
