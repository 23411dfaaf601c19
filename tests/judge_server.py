"""A small chat endpoint on this machine, which answers as a test says."""

import contextlib
import http.server
import json
import threading
import time


def completion(text):
    """The body of a chat completion."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class JudgeServer(http.server.ThreadingHTTPServer):
    """`answer(number, body)`, of the request's number from 0 and its content, gives what is sent.

    A text is the body of a 200; (status, headers, text) is all of it; a number of seconds is waited for, and then
    nothing is sent; None closes the connection.
    """

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.requests = []  # (path, headers, body)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 5

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answer(number, body)
        if isinstance(answer, (int, float)):
            time.sleep(answer)
        if not isinstance(answer, (str, tuple)):
            return
        status, headers, text = (200, {}, answer) if isinstance(answer, str) else answer
        data = text.encode()
        with contextlib.suppress(ConnectionError):  # Who asked may have gone.
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(answer):
    """A server that runs while the block does."""
    server = JudgeServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
