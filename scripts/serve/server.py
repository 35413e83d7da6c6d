"""A running `moonlight serve`, for the scripts in this folder: start, wait, measure, stop."""

import contextlib
import http.client
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

START_SECONDS = 120


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def add_arguments(parser, model_help="the model to serve; without it a tiny one is trained first"):
    """The options of every script in this folder."""
    parser.add_argument("--moonlight", type=common.program, default=common.ROOT / "target/release/moonlight")
    parser.add_argument("--model", type=pathlib.Path, help=model_help)


def busy(server):
    """Sequences that run or wait for a place."""
    return server.metric("moonlight_slots_busy") + server.metric("moonlight_requests_waiting")


class Server:
    """`moonlight serve` in a process of its own, or any other OpenAI-compatible server by its command or URL.

    `command` may contain `{port}`. Stderr goes to a file, because a pipe that is not read would block the server."""

    def __init__(self, command=None, url=None, key=None, health="/health", environment=None):
        self.process, self.key, self.health = None, key, health
        self.log = tempfile.TemporaryFile()
        if url:
            self.host, self.port = urllib.parse.urlsplit(url).hostname, urllib.parse.urlsplit(url).port
        else:
            self.host, self.port = "127.0.0.1", free_port()
            filled = [str(part).replace("{port}", str(self.port)) for part in command]
            self.process = subprocess.Popen(
                filled, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=environment
            )
        self.wait()

    @classmethod
    def moonlight(cls, program, model, *more, **options):
        command = [program, "serve", "--model", model, "--device", "cpu", "--port", "{port}", *more]
        return cls(command, **options)

    @property
    def url(self):
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self):
        return self.process.pid

    def wait(self):
        """Waits until the server answers. Ends the script with the server's log if it does not."""
        started = time.monotonic()
        while time.monotonic() - started < START_SECONDS:
            if self.process and self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get(self.health, timeout=2)[0] == 200:
                    self.seconds_to_start = time.monotonic() - started
                    return
            time.sleep(0.05)
        self.kill()
        sys.exit(f"error: the server does not answer\n{self.said()}")

    def request(self, method, path, body=None, headers=None, timeout=30):
        """Status, headers and body of one request on its own connection."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def get(self, path, timeout=30, headers=None):
        return self.request("GET", path, headers=headers, timeout=timeout)

    def post(self, path, value, timeout=120, headers=None):
        """Status and decoded JSON of a POST of JSON."""
        headers = {"Content-Type": "application/json"} | (headers or {})
        status, _, body = self.request("POST", path, json.dumps(value), headers, timeout)
        return status, json.loads(body)

    def metrics(self):
        """The values of `/metrics`: a name with its labels, as it is printed, and its number."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        status, _, body = self.get("/metrics", headers=headers)
        assert status == 200, f"/metrics answered {status}"
        found = {}
        for line in body.decode().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found

    def metric(self, name):
        """The sum of a metric over its labels; None if there is none of that name."""
        pattern = re.compile(rf"{re.escape(name)}(\{{.*\}})?$")
        values = [value for key, value in self.metrics().items() if pattern.match(key)]
        return sum(values) if values else None

    def alive(self):
        return self.process is None or self.process.poll() is None

    def memory_mib(self, key="VmRSS"):
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(f"{key}:"))

    def open_files(self):
        return len(list(pathlib.Path(f"/proc/{self.pid}/fd").iterdir()))

    def threads(self):
        return len(list(pathlib.Path(f"/proc/{self.pid}/task").iterdir()))

    def said(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-4000:]

    def terminate(self, seconds=60):
        """SIGTERM, and the exit status; None if the server had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
