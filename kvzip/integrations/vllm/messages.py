"""What the scheduler's connector and those of the workers tell each other each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(frozen=True)
class Load:
    """Slots of a portable context that go into the paged cache.

    key: of the context.  start, stop: slots, which stand at the same places of the request.  blocks: of the request,
    one list a group of layers; 0 where a window has left a block behind.
    """

    key: str
    start: int
    stop: int
    blocks: tuple[tuple[int, ...], ...]


@dataclass
class Step(KVConnectorMetadata):
    """To the workers, applied before the forward pass.

    opened: (key, path) of contexts to open.  closed: keys of contexts to give up.  handles: (block, key or None) of
    first blocks that are, or no longer are, the handle of a context; in order.  refused: requests that
    end with an error.  loads: what is copied right before the forward pass.
    """

    opened: list[tuple[str, str]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    handles: list[tuple[int, str | None]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """To the scheduler: (key, why it could not be opened or "") of contexts, one a worker."""

    opened: list[tuple[str, str]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reports:
        assert isinstance(other, Reports)
        return Reports([*self.opened, *other.opened])
