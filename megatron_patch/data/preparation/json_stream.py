"""JSON of any size, record by record: a list of records, or one record per line."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_patch.errors import UserError

READ_BYTES = 1 << 20
MAX_RECORD_CHARACTERS = 64 << 20
BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")


def stream_records(path: Path) -> Iterator[Any]:
    """The records of a JSON list or of JSON lines, one at a time.  Raises UserError for text that is not JSON."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _stream(file, path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _stream(file: TextIO, path: Path) -> Iterator[Any]:
    """Decode value after value from a buffer that is refilled when a value does not end within it."""
    decode = json.JSONDecoder().raw_decode
    skip = BETWEEN_VALUES.match
    buffer, position, at_end, in_list, number = "", 0, False, False, 0

    def fail(what: str) -> UserError:
        return UserError(f"{path}: {what} after record {number}; wanted a JSON list of records, or one record per line")

    while True:
        position = skip(buffer, position).end()
        if position < len(buffer):
            if number == 0 and not in_list and buffer[position] == "[":
                in_list = True
                position += 1
                continue
            if in_list and buffer[position] == "]":
                rest = buffer[position + 1 :] + file.read(READ_BYTES)
                if rest.strip():
                    raise fail("text after the end of the list")
                return
            try:
                record, end = decode(buffer, position)
            except json.JSONDecodeError as error:
                if at_end:
                    raise fail(f"broken JSON ({error.msg})") from None
                if len(buffer) - position > MAX_RECORD_CHARACTERS:
                    raise fail(f"no complete value within {MAX_RECORD_CHARACTERS >> 20} million characters") from None
            except RecursionError:
                raise fail("JSON nested too deeply") from None
            else:
                # A number at the buffer's end may go on in the next piece; records are objects, which close themselves.
                if isinstance(record, dict) or at_end or end < len(buffer):
                    number += 1
                    position = end
                    yield record
                    continue
        elif at_end:
            if in_list:
                raise fail("the list is not closed")
            return
        more = file.read(READ_BYTES)
        at_end = not more
        buffer, position = buffer[position:] + more, 0


def count_key(path: Path, keys: Sequence[str]) -> int:
    """How often one of these keys stands in a JSON file: no fewer than its records that have one of them.

    Quotation marks within a JSON text are escaped, so a text that speaks of "conversations" is not counted.
    Raises UserError when the file cannot be read.
    """
    found = 0
    for key in keys:
        mark = f'"{key}"'.encode()
        end = b""
        try:
            with path.open("rb") as file:
                while block := file.read(READ_BYTES):
                    block = end + block
                    found += block.count(mark)
                    end = block[-(len(mark) - 1) :]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return found
