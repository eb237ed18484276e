"""What encoded bytes are, told from the bytes themselves; never from a file name or a MIME type."""

from __future__ import annotations

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# JPEG start-of-frame markers; C4, C8 and CC in the same range mean something else.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_format(data: bytes) -> str | None:
    """The image format of `data` (one of IMAGE_FORMATS), or None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    return None


def image_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) as the header declares them, read without any decoder; None where it is cut off.

    A ceiling checked on this pair is checked before a decoder may take memory for the picture.
    """
    match kind:
        case "PNG" if len(data) >= 24 and data[12:16] == b"IHDR":
            return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        case "GIF" if len(data) >= 10:
            return int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
        case "BMP":
            return _bmp_size(data)
        case "WEBP":
            return _webp_size(data)
        case "JPEG":
            return _jpeg_size(data)
    return None


def _bmp_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < 26:
        return None
    if int.from_bytes(data[14:18], "little") == 12:  # OS/2 header: 16-bit sizes
        return int.from_bytes(data[18:20], "little"), int.from_bytes(data[20:22], "little")
    width, height = (int.from_bytes(data[i : i + 4], "little", signed=True) for i in (18, 22))
    return abs(width), abs(height)  # a negative height means rows from the top


def _webp_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < 30:
        return None
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _SOF:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return None


def audio_format(data: bytes) -> str | None:
    """One of WAV (RF64 too), FLAC, OGG and MP3, or None for anything else."""
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "WAV"
    if data.startswith(b"fLaC"):
        return "FLAC"
    if data.startswith(b"OggS"):
        return "OGG"
    # A frame of MPEG audio: 11 set bits, then version and layer; layer 0 would be AAC (ISO/IEC 11172-3, 2.4.2.3).
    if data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] >= 0xE0 and data[1] & 0x06):
        return "MP3"
    return None


def wav_is_cut_off(data: bytes) -> bool:
    """Whether a WAV file ends before its samples do. A size that a stream's writer never filled in says nothing."""
    at = 12 if data[:4] == b"RIFF" else len(data)
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            return at + 8 + size > len(data) and size < 0x7FFF_0000
        at += 8 + size + size % 2
    return False


def video_demuxer(data: bytes) -> str | None:
    """The one demuxer that may read `data`: "mov" (MP4), "matroska" (WebM) or "avi"; None otherwise.

    Playlists (HLS, DASH, concat) name other files and are never given to a demuxer.
    """
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    return None
