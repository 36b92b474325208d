"""A server on this machine that answers as a test tells it to, and notes what it was asked."""

import contextlib
import dataclasses
import http.server
import json
import threading


@dataclasses.dataclass
class Reply:
    """What the server sends back: a status, a body (bytes, or what JSON can write), more headers."""

    body: object = b""
    status: int = 200
    headers: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Asked:
    """What the server was asked."""

    path: str
    body: dict
    headers: dict


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = Asked(self.path, body, dict(self.headers))
        with self.server.noting:
            self.server.asked.append(asked)
            number = len(self.server.asked) - 1
        reply = self.server.answer(number, asked)
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        with contextlib.suppress(ConnectionError):  # a client that was tired of waiting
            self.send_response(reply.status)
            for name, value in {"Content-Length": len(data), **reply.headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(answer):
    """A server for a while: `answer(number of the request, Asked) -> Reply`; its `url` and what was `asked`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.answer, server.asked, server.noting = answer, [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text):
    """A completion as OpenAI's servers send it."""
    return Reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def in_turn(*replies):
    """Replies for request 0, 1, ...; the last one for all that follow."""
    return lambda number, asked: replies[min(number, len(replies) - 1)]


class Pauses(list):
    """An asyncio.sleep that only notes for how long."""

    async def __call__(self, seconds):
        self.append(seconds)
