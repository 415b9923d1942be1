"""A hub on this machine: as much of Hugging Face's HTTP API as its client needs for a model."""

import base64
import hashlib
import json
import os
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from forked import STARTER
from serving import serving

TOKEN = "hf_" + "a1B2c3D4" * 4
LARGE = ".safetensors"  # goes by the protocol of large files (git LFS), the rest in the commit


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a mapping of files; and what was asked for, in order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos, self.objects, self.commits, self.asked = {}, {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo, lines):
        """Take the lines of a commit; a large file must have arrived before."""
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                self.repos[repo][value["path"]] = self.objects[value["oid"]]
        self.commits.append(lines[0]["value"]["summary"])
        return f"{len(self.commits):040x}"


class Answers(BaseHTTPRequestHandler):
    """What the hub answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Nothing on standard error."""

    def do_POST(self):
        body = self._body()
        lines = [json.loads(line) for line in body.splitlines() if line]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            name = f"{lines[0].get('organization') or 'me'}/{lines[0]['name']}"
            known = name in self.server.repos
            self.server.repos.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        elif found := re.fullmatch(r"/api/models/(.+?)/preupload/main", self.path):
            self._answer({"files": [_mode(file["path"]) for file in lines[0]["files"]]})
        elif found := re.fullmatch(r"/api/models/(.+?)/commit/main", self.path):
            oid = self.server.commit(found[1], lines)
            url = f"{self.server.url}/{found[1]}/commit/{oid}"
            self._answer({"success": True, "commitOid": oid, "commitUrl": url})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer(
                {"transfer": "basic", "objects": [*map(self._action, lines[0]["objects"])]}
            )
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({"error": self.path}, 404)

    def do_PUT(self):
        body, oid = self._body(), self.path.rpartition("/")[2]
        right = hashlib.sha256(body).hexdigest() == oid
        if right:
            self.server.objects[oid] = body
        self._answer({}, 200 if right else 400)

    def do_GET(self):
        found = re.fullmatch(r"/(.+?)/resolve/(\w+)/(.+)", self.path)
        content = found and self.server.repos.get(found[1], {}).get(found[3])
        self.server.asked.append((self.command, self.path))
        if content is None:
            self._answer({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest()
        commit = f"{len(self.server.commits):040x}"
        self._answer(content, ETag=f'"{etag}"', **{"X-Repo-Commit": commit})

    def do_HEAD(self):
        self.do_GET()

    def _action(self, wanted):
        upload = {"href": f"{self.server.url}/objects/{wanted['oid']}"}
        return {**wanted, "actions": {"upload": upload}}

    def _body(self):
        self.server.asked.append((self.command, self.path))
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, answer, status=200, **headers):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _mode(path):
    return {
        "path": path,
        "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
        "shouldIgnore": False,
    }


def local_hub():
    """A hub that answers while the block runs."""
    return serving(Hub())


def run_beside(hub, code, folder, *, token=TOKEN):
    """Run a script whose hub is this one: as users set it, by the environment."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",  # the hub's newer protocol for large files; this one has LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return STARTER.run(code, env={**os.environ, **settings}, cwd=folder, strict=False)
