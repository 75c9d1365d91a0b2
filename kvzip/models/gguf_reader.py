"""Reading a GGUF file without its vocabulary: `gguf.GGUFReader` spends up to half a minute on one."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType

from kvzip.errors import InputError

MAGIC = b"GGUF"
LONG_LIST = 1024
LITTLE_ENDIAN = "I"


class HeaderReader(GGUFReader):
    """A GGUFReader whose metadata leaves out the content of long lists (tokens, scores, merges)."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if GGUFValueType(raw_type) == GGUFValueType.ARRAY and self.byte_order == LITTLE_ENDIAN:
            item_type, count = struct.unpack_from("<IQ", self.data, orig_offs)
            if count > LONG_LIST:
                end = self._skip_list(orig_offs + 12, GGUFValueType(item_type), count)
                return end - orig_offs, [], [], [GGUFValueType.ARRAY]
        parts: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
        return parts

    def _skip_list(self, offset: int, item_type: GGUFValueType, count: int) -> int:
        """The offset after a list of `count` numbers or strings that starts at `offset`."""
        if item_type != GGUFValueType.STRING:
            return offset + count * int(self.gguf_scalar_to_np[item_type]().nbytes)
        for _ in range(count):
            offset += 8 + struct.unpack_from("<Q", self.data, offset)[0]
        return offset


def open_gguf(path: Path) -> HeaderReader:
    """A reader of a GGUF file. Raises InputError if it is missing, of another format or cut short."""
    if not path.is_file():
        raise InputError(f"no such GGUF file: {path}")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError(f"not a GGUF file (it does not start with {MAGIC.decode()!r}): {path}")
    try:
        return HeaderReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise InputError(f"damaged or truncated GGUF file: {path} ({error}); fetch it again") from error


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """The numbers and strings of the metadata, by their keys; lists are left out."""
    return {key: field.contents() for key, field in reader.fields.items() if not _is_list(field)}


def _is_list(field: Any) -> bool:
    return bool(field.types) and field.types[0] == GGUFValueType.ARRAY
