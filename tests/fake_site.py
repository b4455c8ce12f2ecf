"""A real HTTP server on localhost that misbehaves on request, and a small COCO site to serve."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from laid.data.download import Archive


class Site:
    """Serves `files` (path -> bytes). `plans[path]` is a list of tricks, one used up per request of that path:

    an int (status code to answer), "drop:N" (N bytes, then the connection dies), "short:N" (claims that N bytes are all),
    "wrong" (bytes of the right number), "flip" (one byte differs), "whole" (ignores Range), "stall" (says nothing for a
    while), "mute" (no Content-Length). `tags[path]` replaces the ETag. `log` records (path, Range header, bytes sent).
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = dict(files)
        self.plans: dict[str, list] = {}
        self.tags: dict[str, str] = {}
        self.log: list[tuple[str, str, int]] = []
        self.rate = 0.0  # seconds to wait between pieces of 4 KiB
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def asked(self, path):
        return [entry for entry in self.log if entry[0] == path]

    def answer(self, request):
        path, wanted = request.path.lstrip("/"), request.headers.get("Range", "")
        plan = self.plans.get(path) or [None]
        trick = plan.pop(0) if self.plans.get(path) else None
        if isinstance(trick, int) or path not in self.files:
            self.log.append((path, wanted, 0))
            request.send_response(trick if isinstance(trick, int) else 404)
            request.send_header("Content-Length", "5")
            request.end_headers()
            request.wfile.write(b"sorry")
            return
        data = self.files[path]
        name, _, number = (trick or "").partition(":")
        tag = self.tags.get(path, f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        if name == "stall":
            time.sleep(0.5)
        if name == "short":
            data = data[: int(number)]
        start, end = 0, len(data)
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if part and name != "whole" and request.headers.get("If-Range", tag) == tag:
            start, end = int(part[1]), min(int(part[2]) + 1 if part[2] else len(data), len(data))
            if start >= len(data):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(data)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                self.log.append((path, wanted, 0))
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            request.send_response(200)
        body = data[start:end]
        if name == "wrong":
            body = bytes(255 - b for b in body)
        if name == "flip" and body:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        request.send_header("ETag", tag)
        if name != "mute":
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if name == "drop":
            body = body[: int(number)]
        self.log.append((path, wanted, len(body)))
        try:
            for at in range(0, len(body), 4096):
                request.wfile.write(body[at : at + 4096])
                if self.rate:
                    request.wfile.flush()
                    time.sleep(self.rate)
        except OSError:  # the client went away
            pass
        request.close_connection = True


def coco_site(root: Path) -> tuple[dict[str, bytes], dict[str, Archive]]:
    """(files, archives) of a site that serves the COCO data at `root` as images.cocodataset.org does."""
    files, archives = {}, {}
    contents = {
        "annotations": sorted((root / "annotations").iterdir()),
        "train2017": sorted((root / "train2017").iterdir()),
        "val2017": sorted((root / "val2017").iterdir()),
    }
    for name, members in contents.items():
        packed = io.BytesIO()
        with zipfile.ZipFile(
            packed, "w", zipfile.ZIP_DEFLATED if name == "annotations" else zipfile.ZIP_STORED
        ) as archive:
            archive.writestr(f"{name}/", b"")
            if name == "annotations":
                archive.writestr("annotations/captions_val2017.json", b"{}")
            for file in members:
                archive.write(file, f"{name}/{file.name}")
                if name != "annotations":
                    files[f"{name}/{file.name}"] = file.read_bytes()
        path = "annotations/annotations_trainval2017.zip" if name == "annotations" else f"zips/{name}.zip"
        files[path] = packed.getvalue()
        archives[name] = Archive(path, len(files[path]), hashlib.md5(files[path]).hexdigest())
    return files, archives
