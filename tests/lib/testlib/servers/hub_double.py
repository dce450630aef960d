"""A model hub, as far as huggingface_hub's own client asks it: repositories, commits, large files.

A commit never changes; a revision is a branch or the id of a commit. ``requests`` lists every
request, ``stored`` every large file that was uploaded.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

File = tuple[str, str, int]  # lfs or regular, sha256 or the content's key, bytes
LARGE = (".arrow", ".safetensors")  # what a hub's .gitattributes names


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, File]] = {}
        self.branches: dict[str, str] = {}
        self.titles: list[str] = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], title: str) -> str:
        sha = hashlib.sha1(f"{branch}{title}{len(self.commits)}{id(self)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.titles.append(title)
        return sha

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class HubDouble:
    """A hub at ``url``. ``refuse``: returns the status with which to refuse a method and path, or
    0; ``tokens``: the tokens that it accepts, with what they allow.
    """

    def __init__(self) -> None:
        self.tokens = {"hf_write0123456789": "write", "hf_read0123456789": "read"}
        self.repositories: dict[str, Repository] = {}  # datasets/me/a, models/me/b
        self.contents: dict[str, bytes] = {}
        self.stored: list[str] = []  # sha256 of each large file that was sent, in order
        self.requests: list[tuple[str, str]] = []  # method and path of each
        self.refuse: Callable[[str, str], int] = lambda method, path: 0
        self._lock = threading.Lock()
        double = self

        class Handler(_Handler):
            hub = double

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def refuse_uploads_after(self, number: int) -> list[str]:
        """Refuse every upload of a large file after the first ``number``; return the list of the
        paths of all uploads, which grows as they come.
        """
        uploads: list[str] = []

        def refuse(method: str, path: str) -> int:
            if method == "PUT":
                uploads.append(path)
            return 403 if method == "PUT" and len(uploads) > number else 0

        self.refuse = refuse
        return uploads

    def refuse_nothing(self) -> None:
        """End the refusals."""
        self.refuse = lambda method, path: 0

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository, by name."""
        found = self.repositories[repository]
        sha = found.at(revision)
        assert sha is not None
        return {name: self.contents[key] for name, (_, key, _) in found.commits[sha].items()}


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # --- answers ----------------------------------------------------------------------------------

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, values: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(values).encode()
        self._send(status, body, Content_Type="application/json", **headers)

    def _error(self, status: int, code: str, message: str = "") -> None:
        self._json({"error": message or code}, status, X_Error_Code=code)

    @property
    def _permission(self) -> str | None:
        """Return what the request's token allows (write, read), "wrong", or None without one."""
        token = self.headers.get("Authorization", "")
        return self.hub.tokens.get(token.removeprefix("Bearer "), "wrong") if token else None

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        with self.hub._lock:
            self.hub.requests.append((self.command, path))
            if status := self.hub.refuse(self.command, path):
                return self._error(status, "Refused", f"no: {self.headers.get('Authorization')}")
            if self._permission == "wrong":
                return self._error(401, "", "Invalid username or password.")
            for pattern, answer in _ROUTES:
                if found := re.fullmatch(pattern, path):
                    return answer(self, *(unquote(part or "") for part in found.groups()))
        return self._error(404, "", f"no such place: {path}")

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    # --- requests ---------------------------------------------------------------------------------

    def _whoami(self) -> None:
        if self._permission is None:
            return self._error(401, "", "no token")
        return self._json({"type": "user", "name": "me", "auth": {}, "orgs": []})

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _create(self) -> None:
        if self._permission != "write":
            return self._error(403, "", "this token may not write")
        requested = json.loads(self.body)
        name = f"{requested.get('organization') or 'me'}/{requested['name']}"
        key = f"{requested.get('type') or 'model'}s/{name}"
        if key in self.hub.repositories:
            return self._error(409, "", "You already created this repo")
        private = requested.get("visibility") == "private" or bool(requested.get("private"))
        self.hub.repositories[key] = Repository(private)
        return self._json({"url": f"{self.hub.url}/{key.removeprefix('models/')}", "name": name})

    def _repository(self, key: str) -> Repository | None:
        """Return the repository if the request may see it; otherwise answer with an error."""
        found = self.hub.repositories.get(key)
        if found is None or (found.private and self._permission is None):
            self._error(401 if self._permission is None else 404, "RepoNotFound", "not found")
            return None
        return found

    def _at(self, key: str, revision: str) -> tuple[Repository, str] | None:
        found = self._repository(key)
        if found is None:
            return None
        sha = found.at(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"no revision {revision}")
            return None
        return found, sha

    def _info(self, key: str, revision: str = "main") -> None:
        if found := self._at(key, revision):
            names = [{"rfilename": name} for name in found[0].commits[found[1]]]
            about = {"id": key.partition("/")[2], "sha": found[1], "private": found[0].private}
            self._json(about | {"siblings": names, "tags": [], "downloads": 0, "likes": 0})

    def _refs(self, key: str) -> None:
        if found := self._repository(key):
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in found.branches.items()
            ]
            self._json({"branches": branches, "converts": [], "tags": []})

    def _branch(self, key: str, name: str) -> None:
        if self._permission != "write":
            return self._error(403, "", "this token may not write")
        if (found := self._repository(key)) is None:
            return None
        if name in found.branches:
            return self._error(409, "", "there is one")
        found.branches[name] = found.branches["main"]
        return self._json({})

    def _entry(self, name: str, file: File) -> dict[str, Any]:
        kind, key, size = file
        content = self.hub.contents[key]
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": oid}
        if kind == "lfs":
            entry["oid"] = hashlib.sha1(key.encode()).hexdigest()
            entry["lfs"] = {"oid": key, "size": size, "pointerSize": 134}
        return entry

    def _tree(self, key: str, revision: str, folder: str = "") -> None:
        if (found := self._at(key, revision)) is None:
            return None
        files, start = found[0].commits[found[1]], f"{folder}/" if folder else ""
        below = {name: file for name, file in files.items() if name.startswith(start)}
        if folder and not below:
            return self._error(404, "EntryNotFound", f"{folder} is not there")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set[str]()
        for name, file in below.items():
            below_folder = name.removeprefix(start)
            parts = below_folder.split("/")[:-1]
            for depth in range(1, (len(parts) if recursive else min(1, len(parts))) + 1):
                folders.add(start + "/".join(parts[:depth]))
            if recursive or not parts:
                entries.append(self._entry(name, file))
        shown = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            for path in sorted(folders)
        ]
        return self._json([*shown, *entries])

    def _paths(self, key: str, revision: str) -> None:
        if found := self._at(key, revision):
            form = self.body.decode()
            names = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form)["paths"]
            files = found[0].commits[found[1]]
            self._json([self._entry(name, files[name]) for name in names if name in files])

    def _preupload(self, key: str, revision: str) -> None:
        if self._permission != "write":
            return self._error(403, "", "this token may not write")
        if (found := self._at(key, revision)) is None:
            return None
        files = found[0].commits[found[1]]
        answers = []
        for one in json.loads(self.body)["files"]:
            name = one["path"]
            mode = "lfs" if name.endswith(LARGE) else "regular"
            answer = {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
            if name in files:
                entry = self._entry(name, files[name])
                answer["oid"] = entry.get("lfs", entry)["oid"]
            answers.append(answer)
        return self._json({"files": answers})

    def _batch(self, key: str) -> None:
        if self._permission != "write":
            return self._error(403, "", "this token may not write")
        objects = []
        for one in json.loads(self.body)["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.contents:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            objects.append(answer)
        return self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "", "another file")
        self.hub.contents[oid] = self.body
        self.hub.stored.append(oid)
        return self._send(200)

    def _commit(self, key: str, revision: str) -> None:
        if self._permission != "write":
            return self._error(403, "", "this token may not write")
        if (found := self._at(key, revision)) is None:
            return None
        files, title = dict(found[0].commits[found[1]]), ""
        for line in self.body.splitlines():
            value = (read := json.loads(line))["value"]
            if read["key"] == "header":
                title = value["summary"]
            elif read["key"] == "file":
                content = base64.b64decode(value["content"])
                name = hashlib.sha256(content).hexdigest()
                self.hub.contents[name] = content
                files[value["path"]] = ("regular", name, len(content))
            elif read["key"] == "lfsFile":
                if value["oid"] not in self.hub.contents:
                    return self._error(400, "", "a large file was not sent")
                files[value["path"]] = ("lfs", value["oid"], value["size"])
            else:
                assert read["key"] == "deletedFile", read
                files.pop(value["path"])
        sha = found[0].commit(revision, files, title)
        url = f"{self.hub.url}/{key}/commit/{sha}"
        return self._json({"success": True, "commitOid": sha, "commitUrl": url})

    def _resolve(self, kind: str, repository: str, revision: str, name: str) -> None:
        if (found := self._at(f"{kind or 'models/'}{repository}", revision)) is None:
            return None
        file = found[0].commits[found[1]].get(name)
        if file is None:
            return self._error(404, "EntryNotFound", f"{name} is not there")
        content, entry = self.hub.contents[file[1]], self._entry(name, file)
        etag = entry.get("lfs", entry)["oid"]
        about = {"ETag": f'"{etag}"', "X_Repo_Commit": found[1], "Accept_Ranges": "bytes"}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if requested is None:
            return self._send(200, content, Content_Length=str(len(content)), **about)
        begin, end = int(requested[1]), int(requested[2] or len(content) - 1)
        part = content[begin : end + 1]
        about["Content_Range"] = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
        return self._send(206, part, **about)


_REPO = r"((?:datasets|models)/[^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/whoami-v2", _Handler._whoami),
    (r"/api/validate-yaml", _Handler._validate),
    (r"/api/repos/create", _Handler._create),
    (rf"/api/{_REPO}", _Handler._info),
    (rf"/api/{_REPO}/revision/([^/]+)", _Handler._info),
    (rf"/api/{_REPO}/refs", _Handler._refs),
    (rf"/api/{_REPO}/branch/([^/]+)", _Handler._branch),
    (rf"/api/{_REPO}/tree/([^/]+)", _Handler._tree),
    (rf"/api/{_REPO}/tree/([^/]+)/(.+)", _Handler._tree),
    (rf"/api/{_REPO}/paths-info/([^/]+)", _Handler._paths),
    (rf"/api/{_REPO}/preupload/([^/]+)", _Handler._preupload),
    (rf"/api/{_REPO}/commit/([^/]+)", _Handler._commit),
    (r"/(.+)\.git/info/lfs/objects/batch", _Handler._batch),
    (r"/lfs/([0-9a-f]{64})", _Handler._store),
    (r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler._resolve),
]
