"""Whether a JPEG or PNG file is whole, told from its structure without decoding a pixel.

SOUND promises that libjpeg or Pillow will not stop while decoding: every segment and table is followed to the end of
the image and checked as libjpeg-turbo checks it (jdmarker.c, jdhuff.c, jdphuff.c, jdmaster.c), every PNG chunk by its
checksum.  What it cannot see: wrong bits between two markers of a JPEG, which libjpeg shows as wrong colours with no
more than a warning, and a PNG whose writer cut the compressed pixels short under right checksums.
Whatever is rare or unclear (arithmetic coding, 12 bits, animated PNG, stray bytes) is DOUBTFUL: decode it to know.
"""

import enum
import functools
import re
import zlib
from dataclasses import dataclass, field

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# In entropy-coded data a marker is 0xff followed by neither 0 (a stuffed byte), a restart marker nor a fill byte.
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

# Markers of ITU T.81, table B.1.
SOF0, SOF1, SOF2, DHT, EOI, SOS, DQT, DRI, APP0, APP15, COM = (
    0xC0, 0xC1, 0xC2, 0xC4, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xEF, 0xFE,
)  # fmt: skip
SCAN = bytes((0xFF, SOS))
MOST_OF_PLAIN_HEADER = 2048  # bytes before its scan: four tables of each kind and a frame take 700
JFIF_BYTES = 14  # of a JFIF header without a thumbnail
MAX_BLOCKS_IN_SCAN = 10  # per interleaved unit, libjpeg's D_MAX_BLOCKS_IN_MCU

# Bit depths that each colour type of a PNG may have (grey, colour, palette, grey and colour with alpha).
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PNG_AFTER_PIXELS = (b"tEXt", b"tIME", b"IEND")  # chunks that Pillow takes behind the pixels without parsing much


class Structure(enum.Enum):
    """What the structure of a file tells."""

    SOUND = "a whole image"
    TRUNCATED = "the bytes end before the image does"
    DOUBTFUL = "unknown until it is decoded"


class _Doubtful(Exception):
    """Not as every sound file is."""


def examine(data: bytes) -> Structure:
    """Follow the structure of an image's bytes."""
    return examine_with_size(data)[0]


def examine_with_size(data: bytes) -> tuple[Structure, tuple[int, int] | None]:
    """Follow the structure; also width and height of a SOUND JPEG file without metadata.

    Metadata (EXIF, Adobe, profiles) are what Pillow may stumble over in a sound file; such a one has none to look at.
    """
    try:
        if data.startswith(JPEG_MAGIC):
            if (size := _size_of_plain_jpeg(data)) is not None:
                return Structure.SOUND, size
            jpeg = _Jpeg(data)
            jpeg.follow()
            return Structure.SOUND, None if jpeg.has_metadata else jpeg.size
        if data.startswith(PNG_MAGIC):
            _follow_png(data)
            return Structure.SOUND, None
    except IndexError:
        return Structure.TRUNCATED, None
    except _Doubtful:
        return Structure.DOUBTFUL, None
    cut_magic = JPEG_MAGIC.startswith(data) or PNG_MAGIC.startswith(data)
    cut_webp = data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")
    return Structure.TRUNCATED if cut_magic or cut_webp else Structure.DOUBTFUL, None


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """The most frequent file: a header without metadata and one scan.  Many have the same header, judged only once."""
    scan = data.find(SCAN, 0, MOST_OF_PLAIN_HEADER)
    if scan < 0:
        return None
    end = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    size = _size_in_plain_header(data[:end])
    if size is not None:
        found = NEXT_MARKER.search(data, end)
        if found is not None and data[found.start() + 1] == EOI:
            return size
    return None


@functools.lru_cache(maxsize=1024)
def _size_in_plain_header(header: bytes) -> tuple[int, int] | None:
    """Width and height, if the file would be a whole image were there nothing but its end behind these bytes."""
    jpeg = _Jpeg(header + bytes((0xFF, EOI)))
    try:
        jpeg.follow()
    except (IndexError, _Doubtful):
        return None
    return None if jpeg.has_metadata else jpeg.size


def _demand(condition: bool) -> None:
    if not condition:
        raise _Doubtful


def _number(data: bytes, start: int, size: int) -> int:
    """Big-endian number; IndexError where the bytes end before it does."""
    if start + size > len(data):
        raise IndexError
    return int.from_bytes(data[start : start + size], "big")


@dataclass
class _Component:
    """A colour channel of the frame."""

    across: int  # sampling factors
    down: int
    quantization: int  # number of its table
    scanned: bool = False


@dataclass
class _Jpeg:
    """Follows the markers of one JPEG file and remembers the tables seen so far."""

    data: bytes
    size: tuple[int, int] = (0, 0)  # width and height
    has_metadata: bool = False  # anything but the bare JFIF header
    progressive: bool = False
    components: dict[int, _Component] = field(default_factory=dict)
    quantization: set[int] = field(default_factory=set)
    huffman: set[int] = field(default_factory=set)  # numbers as stored: DC 0..3, AC 16..19

    def follow(self) -> None:
        """From the first marker behind SOI to the EOI.  Raises _Doubtful, or IndexError where the bytes end."""
        data, position = self.data, 2
        while True:
            _demand(data[position] == 0xFF)
            while data[position + 1] == 0xFF:  # fill bytes
                position += 1
            marker = data[position + 1]
            if marker == EOI:
                _demand(bool(self.components) and all(component.scanned for component in self.components.values()))
                return
            end = position + 2 + _number(data, position + 2, 2)
            _demand(end >= position + 4)
            if end > len(data):
                raise IndexError
            self._segment(marker, data[position + 4 : end])
            position = end
            if marker == SOS:
                found = NEXT_MARKER.search(data, position)
                if found is None:
                    raise IndexError
                position = found.start()

    def _segment(self, marker: int, body: bytes) -> None:
        if APP0 <= marker <= APP15 or marker == COM:
            self.has_metadata |= not (marker == APP0 and len(body) == JFIF_BYTES and body.startswith(b"JFIF\0"))
            return
        try:
            if marker == DHT:
                self.huffman |= _huffman_tables(body)
            elif marker == DQT:
                self.quantization |= _quantization_tables(body)
            elif marker in (SOF0, SOF1, SOF2):
                self._frame(marker, body)
            elif marker == SOS:
                self._scan(body)
            else:
                _demand(marker == DRI and len(body) == 2)
        except IndexError:  # the segment, not the file, is too short
            raise _Doubtful from None

    def _frame(self, marker: int, body: bytes) -> None:
        _demand(not self.components and body[0] == 8 and any(body[1:3]) and any(body[3:5]))
        self.size = (_number(body, 3, 2), _number(body, 1, 2))
        count = body[5]
        _demand(count in (1, 3, 4) and len(body) == 6 + 3 * count)
        self.progressive = marker == SOF2
        for start in range(6, len(body), 3):
            number, sampling, table = body[start : start + 3]
            self.components[number] = _Component(sampling >> 4, sampling & 15, table)
        _demand(len(self.components) == count)
        across = [component.across for component in self.components.values()]
        down = [component.down for component in self.components.values()]
        for factors in (across, down):
            # Fractions of the finest sampling cannot be scaled up by libjpeg.
            _demand(all(1 <= factor <= 4 and max(factors) % factor == 0 for factor in factors))

    def _scan(self, body: bytes) -> None:
        count = body[0]
        _demand(1 <= count <= 4 and len(body) == 4 + 2 * count)
        first, last, approximation = body[-3:]
        high, low = approximation >> 4, approximation & 15
        if self.progressive:
            _demand(last == 0 if first == 0 else count == 1 and first <= last <= 63)
            _demand(low <= 13 and (high == 0 or high == low + 1))
        else:
            _demand((first, last, approximation) == (0, 63, 0))
        numbers = set(body[1 : 1 + 2 * count : 2])
        _demand(len(numbers) == count and numbers <= self.components.keys())
        blocks = 0
        for start in range(1, 1 + 2 * count, 2):
            component, tables = self.components[body[start]], body[start + 1]
            blocks += component.across * component.down
            _demand(component.quantization in self.quantization)
            # A sequential file brings each component once; a progressive one its means (DC) before all the rest.
            _demand(not component.scanned if not self.progressive else component.scanned or first == high == 0)
            if first == 0 and high == 0:
                _demand(tables >> 4 in self.huffman)
            if first > 0 or not self.progressive:
                _demand((tables & 15) + 16 in self.huffman)
            component.scanned = True
        _demand(count == 1 or blocks <= MAX_BLOCKS_IN_SCAN)


@functools.lru_cache(maxsize=256)  # most files carry the tables of the standard
def _huffman_tables(body: bytes) -> frozenset[int]:
    """Numbers of the tables that a DHT segment defines."""
    numbers, position = set(), 0
    while position < len(body):
        number, lengths = body[position], body[position + 1 : position + 17]
        symbols = body[position + 17 : position + 17 + sum(lengths)]
        _demand(number & 15 <= 3 and number >> 4 <= 1 and len(lengths) == 16)
        _demand(len(symbols) == sum(lengths) <= 256 and (number >> 4 == 1 or max(symbols, default=0) <= 15))
        code = 0
        for bits, codes in enumerate(lengths, 1):
            code = 2 * code + codes
            _demand(code < 1 << bits)  # no code may be all ones
        numbers.add(number)
        position += 17 + len(symbols)
    return frozenset(numbers)


@functools.lru_cache(maxsize=256)
def _quantization_tables(body: bytes) -> frozenset[int]:
    """Numbers of the tables that a DQT segment defines."""
    numbers, position = set(), 0
    while position < len(body):
        precision, number = body[position] >> 4, body[position] & 15
        _demand(precision <= 1 and number <= 3)
        numbers.add(number)
        position += 1 + 64 * (1 + precision)
    _demand(position == len(body))
    return frozenset(numbers)


def _follow_png(data: bytes) -> None:
    """From the header to the IEND chunk.  Raises _Doubtful, or IndexError where the bytes end."""
    position, seen = len(PNG_MAGIC), []
    while seen[-1:] != [b"IEND"]:
        length = _number(data, position, 4)
        kind = data[position + 4 : position + 8]
        end = position + 8 + length
        checksum = _number(data, end, 4)
        _demand(kind.isalpha() and zlib.crc32(memoryview(data)[position + 4 : end]) == checksum)
        if not seen:
            _demand(kind == b"IHDR" and length == 13)
            _check_png_header(data[position + 8 : end])
        _demand(kind != b"acTL")  # animated
        if b"IDAT" in seen:
            _demand(kind in PNG_AFTER_PIXELS or (kind == b"IDAT" and seen[-1] == b"IDAT"))
        seen.append(kind)
        position = end + 4
    _demand(b"IDAT" in seen and (b"PLTE" in seen or data[25] != 3))


def _check_png_header(header: bytes) -> None:
    depth, colour, compression, filters, interlaced = header[8:13]
    _demand(depth in PNG_DEPTHS.get(colour, ()) and compression == filters == 0 and interlaced <= 1)
    _demand(any(header[:4]) and any(header[4:8]))
