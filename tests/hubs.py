"""Hubs on the loopback, that speak the calls which the hubs' packages make for us, and remember what they were asked."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = "hf_secretsecretsecret"


class Server(ThreadingHTTPServer):
    """A hub. `refuse`: writes whose address holds these words are answered with `code`, and the token, which a server should not do."""

    def __init__(self, handler: type["Handler"], refuse: str | None = None, code: int = 403):
        super().__init__(("127.0.0.1", 0), handler)
        self.refuse, self.code = refuse, code
        self.here = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}  # repository made → whether it is private
        self.license: str | None = None  # of the last one
        self.uploads: list[tuple[str, bytes]] = []  # as they were committed
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()  # of writes
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, revision) → files to be downloaded
        self.lost: set[str] = set()  # files of them that are listed, and not there
        self.fetched: list[str] = []
        self.cut: int | None = None  # after so many bytes the connection breaks, once
        self.ranges: list[str] = []  # that were asked for


class Handler(BaseHTTPRequestHandler):
    server: Server

    def body(self) -> bytes | None:
        """What a write sends; None where it is refused, and answered."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuse is None or self.server.refuse not in self.path:
            return body
        self.answer(self.server.code, {"error": f"no right to write with {self.headers['Authorization']}"})
        return None

    def answer(self, code, value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(value, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that is asked for."""
        asked = self.headers["Range"] or ""
        start = int(asked.removeprefix("bytes=").split("-")[0] or 0)
        data = content[start:]
        self.send_response(206 if asked else 200)
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        for header, value in {**headers, "Content-Length": str(len(data)), **part}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.server.fetched.append(path)
            self.server.ranges.append(asked)
            cut, self.server.cut = self.server.cut, None
            self.wfile.write(data[:cut])
            if cut is not None:
                self.close_connection = True
                self.connection.shutdown(2)

    def log_message(self, *arguments):
        pass


class HuggingFace(Handler):
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        """What is there: /api/models/{repo}/tree|revision/{revision}; and a file: /{repo}/resolve/{revision}/{path}."""
        parts = urlsplit(self.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, verb, revision, *rest = [*(parts[2:] if api else parts), "", ""][: max(4, len(parts) - 2 * api)]
        there = self.server.repos.get((f"{owner}/{name}", "main" if revision == self.COMMIT else revision))
        path = "/".join(rest)
        if there is None or (verb == "resolve" and path not in there):
            return self.answer(404, {"error": f"{owner}/{name} is not here"})
        if verb == "tree":
            oid = lambda data: hashlib.sha1(data).hexdigest()
            return self.answer(200, [{"type": "file", "path": p, "size": len(x), "oid": oid(x)} for p, x in there.items()])
        if verb == "revision":
            files = [{"rfilename": path} for path in there]
            return self.answer(200, {"id": f"{owner}/{name}", "sha": self.COMMIT, "siblings": files, "private": False, "tags": []})
        etag = hashlib.sha1(there[path]).hexdigest()
        return self.send_file(path, there[path], {"X-Repo-Commit": self.COMMIT, "ETag": f'"{etag}"'})

    def do_POST(self):
        body = self.body()
        if body is None:
            return None
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.private["me/motion"] = asked.get("private") or asked.get("visibility") == "private"
            return self.answer(200, {"url": f"{self.server.here}/me/motion", "name": "me/motion"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [x["value"] for x in lines if x["key"] == "file"]
            self.server.uploads += [(file["path"], base64.b64decode(file["content"])) for file in files]
            return self.answer(200, {"commitUrl": f"{self.server.here}/me/motion/commit/0", "commitOid": "0", "hookOutput": ""})
        return self.answer(404, {"error": self.path})


class ModelScope(Handler):
    def do_GET(self):
        url = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        name = "/".join(url.path.split("/models/")[-1].split("/")[:2])
        if url.path in (f"/openapi/v1/models/{name}", f"/api/v1/models/{name}") and name in self.server.private:
            return self.answer(200, {"Data": {"Name": name}})
        files = self.server.repos.get((name, asked.get("Revision")))
        if files is None:
            return self.answer(404, {"Message": f"{self.path} does not exist for {self.headers['Authorization']}"})
        if url.path == f"/api/v1/models/{name}/repo/files":
            listed = [{"Path": p, "Type": "blob", "Size": len(x), "Sha256": hashlib.sha256(x).hexdigest()} for p, x in files.items()]
            folders = [{"Path": p, "Type": "tree", "Size": 0} for p in {path.rpartition("/")[0] for path in files} if p]
            return self.answer(200, {"Data": {"Files": folders + listed}})
        if asked["FilePath"] in self.server.lost:
            return self.answer(404, {"Message": f"{asked['FilePath']} is gone"})
        return self.send_file(asked["FilePath"], files[asked["FilePath"]], {})

    def do_POST(self):
        body = self.body()
        if body is None:
            return None
        asked = json.loads(body)
        if self.path == "/api/v1/models":
            name = f"{asked['Path']}/{asked['Name']}"
            if name in self.server.private:
                return self.answer(400, {"Code": 10010101001, "Message": "exists"})
            self.server.private[name], self.server.license = asked["Visibility"] == 1, asked["License"]
            return self.answer(200, {"Data": {"Name": name}})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [{"oid": x["oid"], "actions": {"upload": {"href": f"{self.server.here}/blob/{x['oid']}"}}} for x in asked["objects"]]
            return self.answer(200, {"Data": {"objects": objects}})
        if self.path == "/api/v1/repos/models/me/motion/commit/master":
            for x in asked["actions"]:
                content = self.server.blobs[x["sha256"]] if x["type"] == "lfs" else base64.b64decode(x["content"])
                self.server.uploads.append((x["path"], content))
            return self.answer(200, {"Success": True, "Data": {}})
        return self.answer(404, {"Message": self.path})

    def do_PUT(self):
        body = self.body()
        if body is not None:
            self.server.blobs[hashlib.sha256(body).hexdigest()] = body
            self.answer(200, {})
