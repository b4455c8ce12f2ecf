"""A server in this process that speaks the Hugging Face hub's protocol for what `laid push` asks of it."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def hub_at():
    """(address, hub). hub.requests: (path, token, body) of each; hub.files: what was committed, by name."""

    class Hub(BaseHTTPRequestHandler):
        requests, files, status = [], {}, 200

        def do_POST(self):
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else b"".join(self._chunks())
            self.requests.append((self.path, self.headers.get("Authorization"), body))
            found = {}
            if self.path == "/api/repos/create":
                found = {"url": f"http://{self.headers['Host']}/me/mine", "id": "1"}
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                found = {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
                    ]
                }
            elif "/commit/" in self.path:
                lines = [json.loads(line) for line in body.splitlines()]
                sent = [line["value"] for line in lines if line["key"] == "file"]
                self.files.update({f["path"]: base64.b64decode(f["content"]) for f in sent})
                at = f"http://{self.headers['Host']}/me/mine/commit/1"
                found = {"commitUrl": at, "commitOid": "1", "success": True}
            answer = json.dumps(found).encode()
            self.send_response(self.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _chunks(self):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Hub
    server.shutdown()
    server.server_close()
