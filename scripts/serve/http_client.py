"""A small HTTP/1.1 client on asyncio: streamed answers with the time of each event, and connections that misbehave on purpose.

Ordinary clients repair or refuse what the hostile checks send, and their own work would be part of what the load test measures."""

import asyncio
import json
import socket
import time


class Answer:
    """A response: `status`, `headers`, `body`; of a stream also the time and the value of each event."""

    def __init__(self, status, headers):
        self.status, self.headers, self.body, self.events = status, headers, b"", []

    def json(self):
        return json.loads(self.body)


class Connection:
    """One connection. `request` may be called again after a complete answer."""

    def __init__(self, host, port, key=None, receive_buffer=None):
        self.host, self.port, self.key, self.receive_buffer = host, port, key, receive_buffer
        self.reader = self.writer = None

    async def open(self):
        opened = socket.socket()
        opened.setblocking(False)
        if self.receive_buffer:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(opened, (self.host, self.port))
        except BaseException:
            opened.close()
            raise
        # A line of a stream with many log-probabilities is long.
        self.reader, self.writer = await asyncio.open_connection(sock=opened, limit=self.receive_buffer or 1 << 20)
        return self

    def head(self, method, path, headers):
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def send(self, method, path, value=None):
        if self.writer is None:
            await self.open()
        body = b"" if value is None else json.dumps(value).encode()
        headers = {"Content-Length": len(body)} | ({"Content-Type": "application/json"} if body else {})
        self.writer.write(self.head(method, path, headers) + body)
        await self.writer.drain()

    async def send_raw(self, data):
        if self.writer is None:
            await self.open()
        self.writer.write(data)
        await self.writer.drain()

    async def read_head(self):
        status_line = await self.reader.readline()
        if not status_line:
            raise ConnectionResetError("closed before an answer")
        status = int(status_line.split()[1])
        headers = {}
        while True:
            line = (await self.reader.readline()).decode("latin-1").strip()
            if not line:
                return Answer(status, headers)
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()

    async def chunks(self, answer):
        """The parts of a body as they arrive."""
        if answer.headers.get("transfer-encoding") == "chunked":
            while True:
                size = int((await self.reader.readline()).split(b";")[0], 16)
                part = await self.reader.readexactly(size + 2)
                if size == 0:
                    return
                yield part[:-2]
        elif "content-length" in answer.headers:
            yield await self.reader.readexactly(int(answer.headers["content-length"]))
        else:
            while part := await self.reader.read(1 << 16):
                yield part

    async def read(self):
        answer = await self.read_head()
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            rest = b""
            async for part in self.chunks(answer):
                now = time.perf_counter()
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: ") and line[6:].strip() != b"[DONE]":
                        answer.events.append((now, json.loads(line[6:])))
                answer.body = line if lines else answer.body
        else:
            async for part in self.chunks(answer):
                answer.body += part
        if answer.headers.get("connection", "").lower() == "close":
            self.close()
        return answer

    async def request(self, method, path, value=None):
        is_reused = self.writer is not None
        try:
            await self.send(method, path, value)
            return await self.read()
        except ConnectionError:
            # A server may close a connection between two requests.
            self.abort()
            if not is_reused:
                raise
            await self.send(method, path, value)
            return await self.read()

    def abort(self):
        """Vanishes: a reset, without the closing handshake."""
        if self.writer:
            self.writer.transport.abort()
            self.reader = self.writer = None

    def close(self):
        if self.writer:
            self.writer.close()
            self.reader = self.writer = None
