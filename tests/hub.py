"""A small server that speaks what huggingface_hub needs of a hub: names, trees and files, with ranges, tokens and revisions."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs

COMMIT = "a" * 40
_ROUTE = re.compile(
    r"(?:/api/(?:models|datasets)|/datasets)?/([^/]+/[^/?]+)(?:/(revision|tree|resolve|paths-info)/([^/?]+)(?:/(.*?))?)?(?:\?.*)?"
)


class Hub:
    """Serves folders as repositories, of models and of data sets; `requests` are the methods and paths of all calls, in order."""

    def __init__(self, repositories: dict[str, Path], *, private: str | None = None, gated: str | None = None) -> None:
        self.repositories, self.private, self.gated = repositories, private, gated
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.breaks_off: str | None = None
        """The end of a file's name whose transfer breaks off half-way, once."""
        self.url = ""
        self.read_only: str | None = None
        """A repository that is there, and that no token may write to."""
        self.pushed: dict[str, dict[str, bytes]] = {}
        """The files that were committed, by repository; only with the right token."""

    @property
    def downloaded(self) -> list[str]:
        """The files that were sent."""
        return sorted(
            path.partition(f"/resolve/{COMMIT}/")[2] for path in self.requests if path.startswith("GET") and "/resolve/" in path
        )


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "/paths-info/" in self.path:
                return self._answer(body)
            hub.requests.append(f"POST {self.path}")
            if self.path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != "Bearer hf_right":
                return self._error(401, "Unauthorized")
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization', 'me')}/{asked['name']}"
                if name == hub.read_only:
                    return self._send(409, json.dumps({"url": f"{hub.url}/{name}"}).encode(), {})
                hub.pushed.setdefault(name, {})
                return self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main(?:\?.*)?", self.path)
            assert match, self.path
            name, kind = match.groups()
            if kind == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                return self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]})
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    hub.pushed[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None}
            return self._json({"success": True, **commit, "hookOutput": ""})

        def _answer(self, body: bytes = b"") -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if checked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check/write", self.path):
                return self._json({}) if checked[1] in hub.pushed else self._error(403, "Forbidden")
            match = _ROUTE.fullmatch(self.path)
            assert match, self.path
            repository, kind, revision, file = match.groups()
            if repository == hub.private and self.headers.get("Authorization") != "Bearer hf_right":
                return self._error(401, "RepoNotFound")
            if repository == hub.gated:
                return self._error(403, "GatedRepo")
            if repository not in hub.repositories:
                return self._error(404, "RepoNotFound")
            if revision not in (None, "main", "v1", COMMIT):
                return self._error(404, "RevisionNotFound")
            folder = hub.repositories[repository]
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if kind == "resolve":
                return self._file(folder / file)
            if kind == "paths-info":
                named = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                return self._json([_entry(path, folder) for path in files if path.relative_to(folder).as_posix() in named])
            if kind == "tree":
                return self._json([_entry(path, folder) for path in files])
            siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
            return self._json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": []})

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _error(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def _file(self, path: Path) -> None:
            if not path.is_file():
                return self._error(404, "EntryNotFound")
            content, headers = path.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_name(path)}"', "Accept-Ranges": "bytes"}
            status = 200
            if asked := self.headers.get("Range"):
                hub.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content, status = content[start:], 206
            return self._send(
                status, content, headers, breaks_off=bool(hub.breaks_off and path.as_posix().endswith(hub.breaks_off))
            )

        def _send(self, status: int, content: bytes, headers: dict[str, str], *, breaks_off: bool = False) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if breaks_off:
                hub.breaks_off = None
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content)

    return Handler


def _entry(path: Path, folder: Path) -> dict[str, object]:
    return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": _name(path)}


def _name(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
