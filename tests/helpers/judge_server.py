"""A scripted OpenAI-compatible fault server on 127.0.0.1, for the tests of the endpoint judge."""
import contextlib
import http.server
import json
import threading
import time

import pytest


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers POSTs by what `server.script` says for the n-th request (the last entry repeats)."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        with server.lock:
            step = server.script[min(len(server.seen), len(server.script) - 1)]
            server.seen.append((time.monotonic(), body, dict(self.headers), self.path))
        with contextlib.suppress(OSError):               # the client may have gone: that is the test
            step(self, body)

    do_GET = do_POST             # where a followed redirect arrives

    def reply(self, status, text, headers=(), kind="application/json"):
        data = text.encode()
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(data))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def says(text):
    usage = {"prompt_tokens": 7, "completion_tokens": 1}
    completion = json.dumps({"choices": [{"message": {"content": text}}], "usage": usage})
    return lambda h, body: h.reply(200, completion)


def status(code, text="{}", headers=()):
    return lambda h, body: h.reply(code, text, headers)


def prefers_shorter(h, body):
    prompt = body["messages"][0]["content"]
    a, b = prompt.split("SOLUTION A ===\n")[1].split("SOLUTION B ===\n")
    says("A" if len(a) < len(b.split("\n===")[0]) else "B")(h, body)


def sleeps(h, body):
    h.server.closing.wait(5)


def dribbles(h, body):
    h.send_response(200)
    h.end_headers()
    for _ in range(50):
        h.wfile.write(b" ")
        h.wfile.flush()
        if h.server.closing.wait(0.1):
            return


def hangs_up(h, body):
    h.connection.close()


@pytest.fixture
def serve():
    """serve(step, ...) -> (judge_url, server) with one scripted step per request."""
    running = []

    def start(*script):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.script, server.seen = script, []
        server.lock, server.closing = threading.Lock(), threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", server

    yield start
    for server in running:
        server.closing.set()
        server.shutdown()
        server.server_close()
