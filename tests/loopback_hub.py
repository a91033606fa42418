"""A Hub on loopback: as much of its HTTP interface as pushing and loading one model takes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content, status=200):
        self._send(status, json.dumps(content).encode(), [("Content-Type", "application/json")])

    def _missing(self, code):
        self._send(404, b"{}", [("X-Error-Code", code)])

    def do_POST(self):
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'user'}/{request['name']}"
            self.server.repos.setdefault(repo, {})
            self._json({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in path:
            repo = self.server.repos["/".join(path.split("/")[3:5])]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repo[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{'/'.join(path.split('/')[3:5])}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self._missing("RepoNotFound")

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self._json({"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if name not in self.server.repos:
            return self._missing("RepoNotFound")
        files = self.server.repos[name]
        if parts[0] == "api":
            siblings = [{"rfilename": file} for file in files]
            return self._json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        file = "/".join(parts[4:])  # user/repo/resolve/revision/file
        if file not in files:
            return self._missing("EntryNotFound")
        etag = hashlib.sha1(files[file]).hexdigest()
        return self._send(200, files[file], [("ETag", f'"{etag}"'), ("X-Repo-Commit", COMMIT)])

    do_HEAD = do_GET


@contextlib.contextmanager
def loopback_hub():
    """Run the Hub; gives its `url` and `repos`, files by repository and path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos = {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
