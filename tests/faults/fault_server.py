"""A judge's server with faults: 12 kinds, at a seeded share of the calls. It votes for the shorter solution.

Whether a call meets a fault depends on the seed, the prompt and how often that prompt was asked, never on the order in
which threads come: what a client must make of it can be computed (`planned`). Connections that TLS refuses come before
any prompt; for them it is the number of the connection that decides.
"""
import contextlib
import http.server
import json
import random
import socket
import ssl
import struct
import subprocess
import threading
from pathlib import Path

from judge_server import Handler, dribbles, says, sleeps, status

from minimath.judges.endpoint import PROBE

LONG = 1 << 20
WRONG_JSON = ('{"choices": []}', "[1]", "null", '{"choices": [{"message": {"content": null}}]}', "[" * 100_000,
              '{"choices": {"0": "A"}}', '{"choices": [{"message": {"content": ["A"]}}]}', '{"choices": "A"',
              '{"usage": {"prompt_tokens": 1e999}, "choices": [{"message": {"content": "A"}}]}', '"A"', "\ufeff{}")


def resets(h, body):
    """The connection ends with RST instead of a reply; FaultServer.shutdown_request leaves the FIN out."""
    h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def any_of(*steps):
    return lambda h, body: random.Random(json.dumps(body)).choice(steps)(h, body)


FAULTS = {  # name: (what the server does, kinds that the judge counts it under, "sdk": it asks again)
    "time-out": (sleeps, {"timeout"}, "sdk"),
    "429 with Retry-After": (status(429, headers=[("Retry-After", "1")]), {"http_429"}, "sdk"),
    "500": (status(500, "oh no"), {"http_500"}, "sdk"),
    "reset": (resets, {"unreachable"}, "sdk"),
    "slow drip": (dribbles, {"timeout"}, ""),
    "empty": (status(200, ""), {"garbage"}, "sdk"),
    "HTML": (status(200, "<!doctype html><title>Sign in</title>"), {"garbage"}, "sdk"),
    "wrong json": (any_of(*(status(200, text) for text in WRONG_JSON)), {"garbage"}, "sdk"),
    "both letters": (any_of(says("A and B"), says("A\nB"), says("AB"), says("A or B")), {"unreadable"}, ""),
    "1 MB reply": (any_of(says("A " * (LONG // 3)), says("A " * LONG)), {"unreadable"}, ""),
    "wrong model name": (status(404, '{"error": {"message": "no model judge-1"}}'), {"http_404"}, ""),
}
TLS = "TLS refused"
MIXED = "mixed"
SHARES = (0.01, 0.1, 0.5, 1.0)


class FaultHandler(Handler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        prompt, server = body["messages"][0]["content"], self.server
        with server.lock:
            attempt = server.attempts[prompt] = server.attempts.get(prompt, -1) + 1
            fault = server.planned(prompt, attempt)
            server.served[fault] = server.served.get(fault, 0) + 1
        with contextlib.suppress(OSError):  # the client may have gone: that is the test
            (FAULTS[fault][0] if fault else answers)(self, body)


def shorter(prompt: str) -> str:
    """A or B: the shorter of the solutions that a judge's prompt shows."""
    a, b = prompt.split("SOLUTION A ===\n")[1].split("SOLUTION B ===\n")
    return "A" if len(a.split("\n===")[0]) < len(b.split("\n===")[0]) else "B"


def answers(h, body):
    """The right letter, and its log-probs where they are asked for."""
    prompt = body["messages"][0]["content"]
    letter = "A" if prompt == PROBE else shorter(prompt)
    choice = {"message": {"content": letter}}
    if body.get("logprobs"):
        top = [{"token": letter, "logprob": -0.1}, {"token": "B" if letter == "A" else "A", "logprob": -2.4}]
        choice["logprobs"] = {"content": [{"token": letter, "logprob": -0.1, "top_logprobs": top}]}
    h.reply(200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}))


class FaultServer(http.server.ThreadingHTTPServer):
    """Use in `with`; `url` is its judge_url. fault: a name of FAULTS, TLS or MIXED (all of FAULTS alike).

    `served`: calls by fault, "" for good ones, and TLS for refused connections. The probe of `ping` gets an answer.
    """
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, fault: str, share: float, seed: int = 0, pem: Path | None = None):
        super().__init__(("127.0.0.1", 0), FaultHandler)
        self.fault, self.share, self.seed = fault, share, seed
        self.attempts, self.served, self.connections = {}, {}, 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.context = None
        if pem:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(pem)
        self.url = f"http{'s' if fault == TLS else ''}://127.0.0.1:{self.server_port}/v1"

    def planned(self, prompt: str, attempt: int) -> str:
        """The fault that call `attempt`, from 0, for this prompt meets; "" for none."""
        rng = random.Random(f"{self.seed} {attempt} {prompt}")
        if self.fault == TLS or prompt == PROBE or rng.random() >= self.share:
            return ""
        return rng.choice(list(FAULTS)) if self.fault == MIXED else self.fault

    def get_request(self):
        connection, address = super().get_request()
        if self.fault != TLS:
            return connection, address
        self.connections += 1
        refused = random.Random(f"{self.seed} {self.connections}").random() < self.share
        if self.connections > self.calm and refused:
            self.served[TLS] = self.served.get(TLS, 0) + 1
            connection.sendall(b"\x15\x03\x03\x00\x02\x02\x28")  # alert: fatal, handshake_failure
            connection.close()
            raise ConnectionAbortedError
        return self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    calm = 0  # connections before TLS refuses any

    def shutdown_request(self, request):
        on, _ = struct.unpack("ii", request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        (self.close_request if on else super().shutdown_request)(request)

    def handle_error(self, request, client_address):
        """Nothing on stderr: a client that hangs up is part of the test."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()


def make_pem(folder: Path) -> Path:
    """A key and a certificate of its own for 127.0.0.1, by the openssl command."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
                   check=True, capture_output=True)
    pem = folder / "both.pem"
    pem.write_text(key.read_text() + cert.read_text())
    return pem
