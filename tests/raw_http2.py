"""Just enough HTTP/2 to behave as no gRPC library would: calls half open, replies never read."""

import socket
import struct
from collections.abc import Iterator, Mapping

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS = 0, 1, 3, 4
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4


def _frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + content


def _header(name: str, value: str) -> bytes:
    """As HPACK's literal that no table keeps."""
    return b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


class Connection:
    """A connection that sends the given bytes and grants the server no window beyond the first 64 KiB of a call."""

    def __init__(self, address: str, source: str = "127.0.0.1") -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60, source_address=(source, 0))
        self.socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0))
        self._next = 1
        self._authority = address

    def call(self, method: str, message: bytes | None = None, metadata: Mapping[str, str] | None = None) -> int:
        """Begin a call; without a message it stays half open. The stream's number."""
        stream, self._next = self._next, self._next + 2
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/{method}",
            ":authority": self._authority,
            "te": "trailers",
            "content-type": "application/grpc",
            **(metadata or {}),
        }
        content = b"".join(_header(name, value) for name, value in headers.items())
        frames = _frame(_HEADERS, _END_HEADERS, stream, content)
        if message is not None:
            frames += _frame(_DATA, _END_STREAM, stream, b"\0" + struct.pack(">I", len(message)) + message)
        self.socket.sendall(frames)
        return stream

    def reset(self, stream: int) -> None:
        self.socket.sendall(_frame(_RST, 0, stream, struct.pack(">I", 8)))

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """What the server sends, as kind, flags, stream and content, until it closes the connection."""
        file = self.socket.makefile("rb")
        while len(head := file.read(9)) == 9:
            length, kind, flags, stream = int.from_bytes(head[:3], "big"), head[3], head[4], int.from_bytes(head[5:], "big")
            yield kind, flags, stream, file.read(length)

    def ended(self, calls: int) -> dict[int, bytes]:
        """Wait until so many calls have ended; what the trailers of each said, by stream."""
        ends: dict[int, bytes] = {}
        for kind, flags, stream, content in self.frames():
            if (kind == _HEADERS and flags & _END_STREAM) or kind == _RST:
                ends.setdefault(stream, content)
            if len(ends) >= calls:
                break
        return ends

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
