"""Reads multipart forms that are whole in memory: texts and files by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from flashdiff.errors import RequestError
from flashdiff.server.http.errors import HttpError

_MAX_PARTS = 64


@dataclass(frozen=True)
class Form:
    """The parts of a form, those with a file name as files."""

    texts: Mapping[str, str]
    files: Sequence[tuple[str, bytes]] = field(repr=False)


def read_form(content_type: str, body: bytes) -> Form:
    """The form; HttpError for a body that is not one, RequestError for a text that is given twice or is not UTF-8."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise HttpError(400, "content-type: the form's boundary is missing")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks)  # type: ignore[arg-type]  # a part's data comes as bytes and bounds
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise HttpError(400, "the body is not a valid multipart form") from None
    if not parts.is_whole:
        raise HttpError(400, "the multipart form has no end")
    return parts.form()


class _Parts:
    """Gathers what the parser finds."""

    def __init__(self) -> None:
        self._disposition, self._header, self._value = b"", b"", b""
        self._data = list[bytes]()
        self._found = list[tuple[str, bool, bytes]]()  # name, whether it is a file, data
        self.is_whole = False
        self.callbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def form(self) -> Form:
        texts: dict[str, str] = {}
        for name, is_file, data in self._found:
            if is_file:
                continue
            if name in texts:
                raise RequestError(name[:80], texts[name], "it is given twice")
            try:
                texts[name] = data.decode("utf-8")
            except UnicodeDecodeError:
                raise RequestError(name[:80], data[:40], "it must be valid UTF-8") from None
        return Form(texts, [(name, data) for name, is_file, data in self._found if is_file])

    def _begin(self) -> None:
        if len(self._found) == _MAX_PARTS:
            raise HttpError(400, f"the form has more than {_MAX_PARTS} parts")
        self._disposition, self._data = b"", []

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _end(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise HttpError(400, "a part of the form has no name")
        has_file = b"filename" in options or b"filename*=" in self._disposition.lower()  # the second is not among the options
        self._found.append((name, has_file, b"".join(self._data)))

    def _finish(self) -> None:
        self.is_whole = True
