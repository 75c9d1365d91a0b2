"""What a transform is: the kept pairs of a layer, stored in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor

from kvzip.context import RaggedLayer
from kvzip.ops.rope import shift_keys, turn_back
from kvzip.replayed import LayerQueries

Which: TypeAlias = Literal["keys", "values"]


@dataclass(frozen=True)
class Rows:
    """Keys, or values, of one head, and what their codes go by.

    numbers: [n, D].  scores: [n] as of `Evicted`, or None.  prefix_len: how many of the pairs, the first ones, are of
    the prefix.  importance: of an error in each channel [D], or None = the same for all.
    """

    which: Which
    numbers: Tensor
    scores: Tensor | None = None
    prefix_len: int = 0
    importance: Tensor | None = None


@dataclass(frozen=True)
class Evicted:
    """What was known of a full-attention layer before eviction.

    keys, values: [Hkv, P + S, D] of all pairs of prefix and context, keys rotated at their true positions.  keep_mask:
    [Hkv, P + S] bool, what stays.  prefix_len: P.  scores: [N] float32 of the pairs that stay, as they are packed,
    infinite for those of the prefix; None where nothing was scored.  queries: where a transform needs them.
    inv_freq: [R/2] of the layer's rotation, or None where it has none.  later: transforms that are applied afterwards.
    """

    keys: Tensor
    values: Tensor
    keep_mask: Tensor
    prefix_len: int
    scores: Tensor | None = None
    queries: LayerQueries | None = None
    inv_freq: Tensor | None = None
    later: Sequence[BaseTransform] = ()

    def part(self, block: slice) -> slice:
        """Where a part of the context stands in prefix and context."""
        return slice(self.prefix_len + block.start, self.prefix_len + block.stop)

    def read_keys(self, layer: RaggedLayer, head: int) -> Tensor:
        """The keys [n, D] float32 of a head as they will be read, turned to their true positions.  layer: of floats."""
        assert isinstance(layer.keys, Tensor)
        rows = slice(layer.offsets[head], layer.offsets[head + 1])
        importance = None if self.queries is None else self.key_importance[head]
        found = self._read_back(Rows("keys", layer.keys[rows], self._scores(rows), self.prefix_len, importance))
        return shift_keys(found.float(), self.inv_freq, self.keys.shape[1])

    def read_values(self, values: Tensor, rows: slice) -> Tensor:
        """Values [n, D] of one head, at these rows of the layer, as they will be read; of none of the prefix."""
        return self._read_back(Rows("values", values, self._scores(rows)))

    def _scores(self, rows: slice) -> Tensor | None:
        return None if self.scores is None else self.scores[rows]

    def _read_back(self, rows: Rows) -> Tensor:
        """The numbers [n, D] as they are read once all is applied."""
        for transform in self.later:
            rows = replace(rows, numbers=transform.read_back(rows))
        return rows.numbers

    @cached_property
    def key_importance(self) -> Tensor:
        """How much an error in each channel of a key moves logits: [Hkv, D] float32, the mean square of the queries.

        Of those of the replay, turned as if all stood where a question begins.
        """
        assert self.queries is not None
        positions = self.keys.shape[1] + self.queries.place_of.to(self.keys.device)
        queries = turn_back(self.queries.query.float(), self.inv_freq, positions)
        return queries.square().mean(dim=1).view(len(self.keys), -1, queries.shape[2]).mean(dim=1)

    @property
    def is_rounded(self) -> bool:
        """Whether numbers become codes afterwards."""
        return any(transform.stores_codes for transform in self.later)


class BaseTransform:
    """Changes what eviction left of each full-attention layer, one layer after another.

    summary, source: for `kvzip methods`.  shares_layers: whether layers are read and stored with the keys and values of
    another one, as a profile of the model says.  stores_codes: whether numbers become codes; only one transform of a
    method may do that.  needs_scores, needs_queries: whether `apply` is to be given the scores of the pairs, and
    queries of the replay.  bias_nbytes: bytes that a pair takes beside its key and value.
    Options are the keyword-only parameters of `__init__` (see `kvzip.parts`).
    """

    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    shares_layers: ClassVar[bool] = False
    stores_codes: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    needs_queries: bool = False
    bias_nbytes: ClassVar[int] = 0

    def apply(self, layer: RaggedLayer, evicted: Evicted) -> RaggedLayer:
        """The same pairs in another form. Raises InputError where these can't be stored so."""
        raise NotImplementedError

    def choose(self, evicted: Evicted) -> Tensor:
        """The keep mask [Hkv, P + S] that is taken, with as many pairs; that of `evicted` unless the transform has
        reasons for another one."""
        return evicted.keep_mask

    def read_back(self, rows: Rows) -> Tensor:
        """The numbers [n, D] as they are read once this is applied."""
        return rows.numbers

    def pair_nbytes(self, head_dim: int, itemsize: int) -> float:
        """Bytes of the key and the value of one pair, on average.  itemsize: bytes of a number before."""
        return 2 * head_dim * itemsize

    def prefix_pair_nbytes(self, head_dim: int, itemsize: int) -> float:
        """The same of a pair of the prefix."""
        return self.pair_nbytes(head_dim, itemsize)

    def head_nbytes(self, head_dim: int) -> int:
        """Bytes that a head may take beside those of its pairs, at most."""
        return 0
