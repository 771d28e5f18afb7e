"""A small Hub on the loopback: enough of its API for the real huggingface_hub client, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """One model: its files, and what goes wrong with it.

    Attributes:
        files: name → content.
        answers: (method, what) → (status, headers) sent instead of an answer; `what` is "info", "tree" or a file name.
        cut: file → bytes after which its first GET is cut off.
        wrong_size: file → size that HEAD claims.
        extra: further names in the listing.
        branches: branch or tag → commit. history: other commits → their files; `files` are those of COMMIT.
        redirected: files that are served from another path, as large ones are.
        claims: revision or file → commit that answers about it state, instead of its own.
        kind: the Hub's type of the repository, "model" or "kernel".
    """

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    answers: dict[tuple[str, str], tuple[int, dict[str, str]]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    wrong_size: dict[str, int] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)
    redirected: set[str] = field(default_factory=set)
    claims: dict[str, str] = field(default_factory=dict)
    kind: str = "model"

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, tag, whole or short hash; None if there is none."""
        if revision in self.branches:
            return self.branches[revision]
        short = [commit for commit in self.history if len(revision) >= 7 and commit.startswith(revision)]
        return short[0] if short else COMMIT if revision in self.revisions else None

    def at(self, commit: str) -> dict[str, bytes]:
        """The files of a commit."""
        return self.history.get(commit, self.files)


class HubServer:
    """`with HubServer({"org/name": Repo(...)}) as hub: ... hub.endpoint`. `hub.log` lists (method, path, range)."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.log: list[tuple[str, str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path, _ in self.log
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range", "")))
        is_api = path.startswith(("/api/models/", "/api/kernels/"))
        kind = "kernel" if path.startswith(("/api/kernels/", "/kernels/")) else "model"
        parts = path.removeprefix("/api" if is_api else "").removeprefix(f"/{kind}s").strip("/").split("/")
        repo = self.hub.repos.get("/".join(parts[:2]))
        if repo is None or repo.kind != kind:
            return self._send(404, headers={"X-Error-Code": "RepoNotFound"})
        if not is_api:
            if parts[2:3] not in (["resolve"], ["moved"]):
                return self._send(404)
            return self._file(repo, parts[2], parts[3], "/".join(parts[4:]))
        what = "tree" if parts[2:3] == ["tree"] else "info"
        revision = "/".join(parts[3:]) or "main"
        if (self.command, what) in repo.answers:
            status, headers = repo.answers[(self.command, what)]
            return self._send(status, headers=headers)
        commit = repo.commit(revision)
        if commit is None:
            return self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = repo.at(commit)
        names = [*files, *repo.extra]
        if what == "tree":
            listing = [
                {"type": "file", "path": n, "size": len(files.get(n, b"")), "oid": _etag(n.encode())} for n in names
            ]
            return self._json(listing)
        siblings = [{"rfilename": n, "size": len(files.get(n, b""))} for n in names]
        sha = repo.claims.get(revision, commit)
        return self._json({"id": "/".join(parts[:2]), "sha": sha, "siblings": siblings, "tags": []})

    def _file(self, repo: Repo, way: str, revision: str, name: str) -> None:
        commit = repo.commit(revision) or COMMIT
        files = repo.at(commit)
        if (self.command, name) in repo.answers:
            status, headers = repo.answers[(self.command, name)]
            return self._send(status, headers=headers)
        if name not in files:
            return self._send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        body = files[name]
        stated = repo.claims.get(name, commit)
        headers = {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": stated, "Accept-Ranges": "bytes"}
        if way == "resolve" and name in repo.redirected:
            linked = {"X-Linked-Size": str(len(body)), "X-Linked-ETag": headers["ETag"], "X-Repo-Commit": stated}
            place = self.path.replace("/resolve/", "/moved/", 1)
            return self._send(302, headers={**linked, "Location": self.hub.endpoint + place})
        if name in repo.wrong_size:
            headers["X-Linked-Size"] = str(repo.wrong_size[name])
            headers["X-Linked-ETag"] = headers["ETag"]
        wanted = self.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command == "GET" and name in repo.cut:
            return self._send(206 if start else 200, body[start:], headers, cut=repo.cut.pop(name))
        return self._send(206 if start else 200, body[start:], headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
