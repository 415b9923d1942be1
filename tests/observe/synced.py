"""A server on this machine that takes what `wandb sync` reads out of an offline run."""

import gzip
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from serving import serving


class Tracker(ThreadingHTTPServer):
    """What the client sent: the rows of the history, the settings, and all bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.rows, self.config, self.sent = [], {}, b""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def graphql(self, name, variables):
        """The answer to a question or a change."""
        if name == "UpsertBucket":
            found = json.loads(variables.get("config") or "{}")
            self.config |= {key: item["value"] for key, item in found.items()}
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            run = {"id": "r", "name": variables["name"], "displayName": "r", "project": project}
            return {"upsertBucket": {"bucket": run, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/put/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}


class Answers(BaseHTTPRequestHandler):
    """What the server answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Nothing on standard error."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.sent += body
        answer = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.graphql(asked.get("operationName"), asked["variables"])}
        elif self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.server.rows += [json.loads(line) for line in history.get("content", [])]
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self):
        self.do_POST()


def tracker():
    """A server that answers while the block runs."""
    return serving(Tracker())
