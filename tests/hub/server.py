"""As much of the Hub's HTTP interface as it takes to stream a dataset and to push and load a model.

The responses hold what `huggingface_hub` reads of them. Large files are served like small ones: no LFS, Xet or CDN.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional, Union
from urllib.parse import parse_qs, unquote, urlsplit

# Groups: the kind of repository, user/name, what is asked for, revision, path.
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)/([^/]+)(?:/(.+))?)?")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)")
# What takes a token.
NEEDS_TOKEN = re.compile(r"^/api/(?:whoami-v2|repos/create$|.+/(?:preupload|commit)/)")

Files = dict[str, bytes]


@dataclass(frozen=True)
class Request:
    """What a client has sent.

    Args:
        method (str): such as `"GET"`.
        path (str): of the URL, without its query.
        range (str, optional): the bytes that it asks for, such as `"bytes=0-99"`.
        token (str, optional): its access token.
    """

    method: str
    path: str
    range: Optional[str] = None
    token: Optional[str] = None


@dataclass
class Fault:
    """What goes wrong with some requests.

    Args:
        kind (int or str): the status of the response; `"reset"` closes the connection without a response, by RST;
            `"truncated"` closes it after half of the body; `"slow"` waits before the right response.
        matches (Callable[[Request], bool]): whether a request is one of them.
        times (int, optional): how often for each method and path. Default: always.
        seconds (float): how long `"slow"` waits. Default: 1.5.
        headers (dict): headers of a response with a status, such as `Retry-After`.
    """

    kind: Union[int, str]
    matches: Callable[[Request], bool]
    times: Optional[int] = None
    seconds: float = 1.5
    headers: dict[str, str] = field(default_factory=dict)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def strikes(self, request: Request) -> bool:
        """Whether a request fails; counts it if so."""
        key = (request.method, request.path)
        if not self.matches(request) or (self.times is not None and self.seen[key] >= self.times):
            return False
        self.seen[key] += 1
        return True


class HubError(Exception):
    """A response that is an error: its status, the code by which the clients tell one from another, and a message."""


class Hub(ThreadingHTTPServer):
    """The server and all that it holds.

    Its `repos` are files by repository: `"user/name"` is a model and `"datasets/user/name"` a dataset, on their main
    branch; `"user/name@revision"` is another branch, tag or commit. What was committed is kept under its id, too.
    Only the access tokens in `private` and `gated` open these repositories; a token begins with `hf_`, as on the Hub.
    Of the `faults`, the first that fits goes wrong. The `requests` are all that came, in their order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Files] = {}
        self.private: dict[str, str] = {}
        self.gated: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may leave before the response is sent
            super().handle_error(request, client_address)

    def environment(self, home: Union[str, os.PathLike]) -> dict[str, str]:
        """Variables with which a client finds this Hub, without a token, and keeps its files in a folder of its own."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home)}
        # Nothing else is asked, not even for an address: as their proxy, this Hub refuses what is for other hosts.
        variables |= {"http_proxy": self.url, "https_proxy": self.url, "no_proxy": "127.0.0.1"}
        return {**variables, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}

    def receive(self, request: Request) -> Optional[Fault]:
        """Note a request; gives what shall go wrong with it."""
        with self.lock:
            self.requests.append(request)
            return next((fault for fault in self.faults if fault.strikes(request)), None)

    def check_access(self, name: str, token: Optional[str], reads_files: bool) -> None:
        """Refuse a client that may not read a repository; without a token, a missing one looks like a private one."""
        if name not in self.repos or self.private.get(name, token) != token:
            raise HubError(404 if token else 401, "RepoNotFound", "Repository not found")
        if reads_files and self.gated.get(name, token) != token:
            raise HubError(403 if token else 401, "GatedRepo", f"Access to {name} is restricted.")

    def revision(self, name: str, revision: str) -> tuple[str, Files]:
        """Id and files of a branch, tag or commit."""
        for key, files in list(self.repos.items()):
            branch = "main" if key == name else key.removeprefix(f"{name}@")
            if branch != key and revision in (branch, commit_id(files)):
                return commit_id(files), files
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> str:
        """Add files to a branch; gives the commit's id."""
        with self.lock:
            files = self.repos[name if revision == "main" else f"{name}@{revision}"]
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = commit_id(files)
            self.repos[f"{name}@{commit}"] = dict(files)
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or else each body waits for the client to acknowledge the headers
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def respond(self) -> None:
        """Answer a request of any method."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.command, unquote(url.path), self.headers.get("Range"), token)
        self.fault = self.server.receive(request)
        if self.fault is not None and self.fault.kind == "slow":
            time.sleep(self.fault.seconds)
        elif self.fault is not None and self.fault.kind == "reset":
            # To close without waiting for what is in the buffers is to send RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
            return
        try:
            if self.fault is not None and isinstance(self.fault.kind, int):
                raise HubError(self.fault.kind, "", "The server was told to fail")
            if token is not None and not token.startswith("hf_"):
                raise HubError(401, "", "Invalid credentials in Authorization header")
            if token is None and NEEDS_TOKEN.search(url.path):
                raise HubError(401, "", "Invalid username or password.")
            if match := API.fullmatch(url.path) or FILE.fullmatch(url.path):
                kind, name, what, revision, path = (part and unquote(part) for part in match.groups())
                name = f"datasets/{name}" if kind == "datasets" else name
                self.server.check_access(name, token, reads_files=what == "resolve")
                self.respond_for_repo(name, what, revision or "main", path, body)
            else:
                self.respond_for_account(request, body)
        except HubError as error:
            status, code, message = error.args
            headers = {"X-Error-Code": code, "X-Error-Message": message, **(self.fault.headers if self.fault else {})}
            self.send(status, json.dumps({"error": message}).encode(), **headers)

    do_GET = do_HEAD = do_POST = respond

    def respond_for_account(self, request: Request, body: bytes) -> None:
        """What is not about a repository that there is."""
        if request.path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif request.path == "/api/whoami-v2":
            self.send_json({"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif request.path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields.get('organization') or 'user'}/{fields['name']}"
            key = f"datasets/{name}" if fields.get("type") == "dataset" else name
            status = 409 if key in self.server.repos else 200
            self.server.repos.setdefault(key, {})
            self.send_json({"url": f"{self.server.url}/{key}", "name": name, "id": name}, status)
        else:
            raise HubError(404, "", "No such page")

    def respond_for_repo(self, name: str, what: Optional[str], revision: str, path: Optional[str], body: bytes) -> None:
        """What is about a revision of a repository."""
        commit, files = self.server.revision(name, revision)
        if what in (None, "revision"):
            siblings = [{"rfilename": file} for file in files]
            self.send_json({"id": name.removeprefix("datasets/"), "sha": commit, "siblings": siblings, "tags": []})
        elif what == "resolve":
            self.send_file(path or "", commit, files)
        elif what == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
            prefix = f"{path}/" if path else ""
            if prefix and not any(file.startswith(prefix) for file in files):
                raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
            below = {entry: value for entry, value in entries(files).items() if entry.startswith(prefix)}
            self.send_json([below[entry] for entry in below if recursive or "/" not in entry[len(prefix) :]])
        elif what == "paths-info":
            paths = parse_qs(body.decode())["paths"]
            self.send_json([entry for file, entry in entries(files).items() if file in paths])
        elif what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            oids = {file: blob_id(content) for file, content in files.items()}
            self.send_json({"files": [{"path": file, "oid": oids.get(file), **mode} for file in asked]})
        elif what == "commit":
            commit = self.server.commit(name, revision, list(map(json.loads, body.splitlines())))
            url = f"{self.server.url}/{name}/commit/{commit}"
            self.send_json({"success": True, "commitOid": commit, "commitUrl": url})
        else:
            raise HubError(404, "", "No such page")

    def send_file(self, path: str, commit: str, files: Files) -> None:
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.send(200, content, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return self.send(416, **headers, **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.send(206, content[first : last + 1], **headers)

    def send_json(self, content: Any, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.fault is not None and self.fault.kind == "truncated":
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)


def blob_id(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_id(files: Files) -> str:
    """A hash of all files, in the form of a commit's."""
    return hashlib.sha1(json.dumps(sorted((path, blob_id(files[path])) for path in files)).encode()).hexdigest()


def entries(files: Files) -> dict[str, dict[str, Any]]:
    """Files and their folders as the Hub describes them, by their paths."""
    folders = {path[:end] for path in files for end in range(len(path)) if path[end] == "/"}
    described: dict[str, dict[str, Any]] = {
        path: {"type": "directory", "path": path, "size": 0, "oid": blob_id(path.encode())} for path in folders
    }
    for path, content in files.items():
        described[path] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    return dict(sorted(described.items()))


@contextlib.contextmanager
def loopback_hub() -> Iterator[Hub]:
    """Run the Hub while a block of code runs; the clients find it by the environment variable HF_ENDPOINT."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
