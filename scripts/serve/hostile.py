"""Clients that misbehave: they vanish, send nonsense, read slowly, flood. The part `hostile` of `load_test.py`.

After each group the server must answer an ordinary request, and at the end every place of its queue, every file descriptor and every thread must
be given back."""

import asyncio
import contextlib
import json
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import server as serving
from http_client import Connection

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# The server may close idle and slow connections after this time; the checks wait for it at most so long.
PATIENCE = 90


class Hostile:
    def __init__(self, server, check, short):
        self.server, self.check, self.short = server, check, short
        self.model = json.loads(server.get("/v1/models", headers=self.authorization())[2])["data"][0]["id"]
        # A token that is forced, so that an answer lasts for as long as the check needs it, whatever the model.
        self.long = {
            "model": self.model,
            "prompt": "a long answer",
            "max_tokens": 600,
            "ignore_eos": True,
            "temperature": 1,
            "stream": True,
        }

    def authorization(self):
        return {"Authorization": f"Bearer {self.server.key}"} if self.server.key else {}

    def connection(self):
        return Connection(self.server.host, self.server.port, self.server.key)

    def times(self, count):
        return max(2, count // 5) if self.short else count

    async def answers(self, seconds=60):
        """Whether an ordinary request is answered."""
        try:
            async with asyncio.timeout(seconds):
                connection = self.connection()
                value = {"model": self.model, "prompt": "still there?", "max_tokens": 2}
                answer = await connection.request("POST", COMPLETIONS, value)
                connection.close()
                return answer.status == 200
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return False

    async def idle(self, seconds=60):
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if await asyncio.to_thread(serving.busy, self.server) == 0:
                return True
            await asyncio.sleep(0.05)
        return False

    async def raw(self, data, seconds=15, more=()):
        """The status of an answer to raw bytes; `closed` without an answer, `hangs` if neither comes."""
        connection = self.connection()
        try:
            async with asyncio.timeout(seconds):
                with contextlib.suppress(ConnectionError):
                    await connection.send_raw(data)
                    for part in more:
                        await connection.send_raw(part)
                        await asyncio.sleep(0)
                return (await connection.read_head()).status
        except (OSError, asyncio.IncompleteReadError, ValueError, IndexError):
            return "closed"
        except TimeoutError:
            return "hangs"
        finally:
            connection.abort()

    def head(self, path=COMPLETIONS, method="POST", **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.connection().head(method, path, {"Content-Type": "application/json"} | headers)

    async def body(self, data, path=COMPLETIONS, seconds=30):
        return await self.raw(self.head(path, Content_Length=len(data)) + data, seconds)

    async def statuses(self, name, cases, right):
        """Each case's status must be one of `right`."""
        wrong = {}
        for label, call in cases.items():
            found = await call
            if found not in right:
                wrong[label] = found
        self.check.expect(f"{name}: {len(cases)} cases", not wrong, wrong or "")


async def vanish(hostile):
    """In the middle of a stream, before the first token, while waiting in the queue; by a reset and by closing."""

    async def one(number):
        connection = hostile.connection()
        await connection.send("POST", COMPLETIONS, hostile.long)
        if number % 3 == 0:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await connection.read_head()
                await connection.reader.readline()
        elif number % 3 == 1:
            await asyncio.sleep(random.random() * 0.3)
        (connection.close if number % 2 else connection.abort)()

    for _ in range(hostile.times(5)):
        await asyncio.gather(*(one(number) for number in range(30)), return_exceptions=True)
    hostile.check.expect("clients that vanish: their places are free", await hostile.idle())


async def malformed_json(hostile):
    text = [
        b"", b"{", b"[]", b"null", b"1", b'"a"', b"{]", b'{"model": "x",}', b"\xff\xfe{}", b'{"a": NaN}', b"\x00" * 100,
        b'{"model": "\xff\xff", "prompt": "a"}', b'{"model": 1, "prompt": "a"}', b'{"model": "x"}', b"{" * 100_000,
        b"[" * 1_000_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'{"prompt": "\\ud800"}', b'{"prompt": "\\x"}',
        b'{"model":"m","model":"m","prompt":"a"}',
    ]  # fmt: skip
    cases = {repr(data[:30]): hostile.body(data) for data in text}
    cases |= {f"chat {data[:30]!r}": hostile.body(data, CHAT) for data in text}
    await hostile.statuses("malformed JSON", cases, {400, 404, 413, 422})


async def invalid_values(hostile):
    def completion(**fields):
        value = {"model": hostile.model, "prompt": "a", "max_tokens": 1} | fields
        return hostile.body(json.dumps(value).encode())

    def chat(messages, **fields):
        value = {"model": hostile.model, "messages": messages, "max_tokens": 1} | fields
        return hostile.body(json.dumps(value).encode(), CHAT)

    def user(text):
        return {"role": "user", "content": text}

    deep = "x"
    for _ in range(60):
        deep = [deep]
    cases = {
        "ids below 0": completion(prompt=[-1]),
        "ids above u32": completion(prompt=[2**32]),
        "ids above u64": completion(prompt=[2**70]),
        "ids that are fractions": completion(prompt=[1.5]),
        "ids and texts": completion(prompt=[1, "a"]),
        "an id outside the vocabulary": completion(prompt=[10**7]),
        "a million ids": completion(prompt=[1] * 1_000_000),
        "ten thousand prompts": completion(prompt=["a"] * 10_000),
        "deep prompts": completion(prompt=deep),
        "a prompt of 4 MB": completion(prompt="word " * 800_000),
        "ten thousand stop strings": completion(stop=[str(n) for n in range(10_000)]),
        "a stop string of 1 MB": completion(stop="x" * 1_000_000),
        "stop of numbers": completion(stop=[1, 2]),
        "n of a billion": completion(n=10**9),
        "max_tokens of 2^63": completion(max_tokens=2**63),
        "max_tokens below 0": completion(max_tokens=-1),
        "logprobs of a billion": completion(logprobs=10**9),
        "temperature of 1e999": hostile.body(b'{"model": "m", "prompt": "a", "temperature": 1e999}'),
        "temperature below 0": completion(temperature=-0.1),
        "top_p of 7": completion(top_p=7),
        "logit_bias with names": completion(logit_bias={"x": 1}),
        "logit_bias of a hundred thousand": completion(logit_bias={str(n): 1 for n in range(100_000)}),
        "logit_bias of 1e300": completion(logit_bias={"1": 1e300}),
        "an unknown field": completion(no_such_field=1),
        "best_of below n": completion(n=3, best_of=1),
        "a model that is absent": completion(model="../../etc/passwd"),
        "a name of 1 MB": completion(model="m" * 1_000_000),
        "stream as a text": completion(stream="yes"),
        "messages as a text": chat("hello"),
        "messages of numbers": chat([1]),
        "no role": chat([{"content": "a"}]),
        "a role of 1 MB": chat([{"role": "r" * 1_000_000, "content": "a"}]),
        "content that is a number": chat([{"role": "user", "content": 3}]),
        "fifty thousand messages": chat([user("a")] * 50_000),
        "tools that are texts": chat([user("a")], tools=["x"]),
        "a tool without a name": chat([user("a")], tools=[{"type": "function", "function": {}}]),
        "tool_choice of another tool": chat([user("a")], tool_choice={"type": "function", "function": {"name": "zzz"}}),
        "a picture": chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]),
    }
    await hostile.statuses("invalid values", cases, {400, 404, 413})


async def malformed_http(hostile):
    host = b"Host: 127.0.0.1\r\n"
    cases = {
        "garbage": hostile.raw(random.Random(1).randbytes(4096)),
        "a TLS hello": hostile.raw(bytes.fromhex("160301020001000001fc0303") + bytes(500)),
        "HTTP/2 preface": hostile.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        "no version": hostile.raw(b"GET /health\r\n\r\n"),
        "an unknown version": hostile.raw(b"GET /health HTTP/9.9\r\n\r\n"),
        "a negative length": hostile.raw(b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Length: -5\r\n\r\n"),
        "two lengths": hostile.raw(
            b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"
        ),
        "a chunk of nonsense": hostile.raw(
            b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n"
        ),
        "a chunk of 2^64": hostile.raw(
            b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n"
        ),
        "a header of NUL": hostile.raw(b"GET /health HTTP/1.1\r\nHost: a\x00b\r\n\r\n"),
        "ten thousand headers": hostile.raw(
            b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(10_000)) + b"\r\n"
        ),
        "a header of 1 MB": hostile.raw(b"GET /health HTTP/1.1\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"),
        "a path of 1 MB": hostile.raw(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n"),
        "a path out of the folder": hostile.raw(hostile.head("/../../../../etc/passwd", "GET")),
        "an encoded path": hostile.raw(hostile.head("/%2e%2e/%2e%2e/etc/passwd%00", "GET")),
        "a path of slashes": hostile.raw(hostile.head("//////", "GET")),
        "TRACE": hostile.raw(hostile.head("/health", "TRACE")),
        "DELETE": hostile.raw(hostile.head(CHAT, "DELETE")),
        "GET of a POST": hostile.raw(hostile.head(CHAT, "GET")),
        "an unknown method": hostile.raw(hostile.head("/health", "FOO")),
    }
    await hostile.statuses("malformed HTTP", cases, {400, 404, 405, 408, 413, 414, 431, 501, 505, "closed"})


async def huge_bodies(hostile):
    before = hostile.server.memory_mib()
    megabyte = b"x" * (1 << 20)
    head = hostile.head(Transfer_Encoding="chunked")
    endless = [b"%x\r\n" % len(megabyte) + megabyte + b"\r\n"] * 256
    cases = {
        "10 GB announced": hostile.raw(hostile.head(Content_Length=10 * 10**9)),
        "10^30 bytes announced": hostile.raw(hostile.head(Content_Length=10**30)),
        "256 MB in chunks": hostile.raw(head, 60, endless),
        "256 MB at once": hostile.raw(hostile.head(Content_Length=256 << 20), 60, [megabyte] * 256),
    }
    await hostile.statuses("huge bodies", cases, {400, 413, "closed"})
    grown = hostile.server.memory_mib() - before
    hostile.check.expect("huge bodies are not kept", grown < 128, f"{grown:+.0f} MiB")


async def slow_readers(hostile):
    """Clients that ask for more than fits into the buffers of their connection, and read none of it."""
    value = hostile.long | {"logprobs": 20, "n": 4}
    connections = []
    for _ in range(12):
        connection = Connection(hostile.server.host, hostile.server.port, hostile.server.key, receive_buffer=4096)
        await connection.open()
        connection.writer.transport.pause_reading()
        await connection.send("POST", COMPLETIONS, value)
        connections.append(connection)
    started = time.monotonic()
    hostile.check.expect("slow readers: another client is answered", await hostile.answers(PATIENCE))
    waited = time.monotonic() - started
    for connection in connections:
        connection.abort()
    hostile.check.expect(
        "slow readers: their places are free", await hostile.idle(), f"the other waited {waited:.1f} s"
    )


async def trickled(hostile):
    """Headers and bodies that arrive byte by byte."""

    async def drip(data, seconds):
        connection = hostile.connection()
        try:
            async with asyncio.timeout(seconds):
                for byte in data:
                    await connection.send_raw(bytes([byte]))
                    await asyncio.sleep(0.5)
                return "sent"
        except OSError:
            return "closed"
        except TimeoutError:
            return "open"
        finally:
            connection.abort()

    seconds = 8 if hostile.short else PATIENCE
    drips = [drip(hostile.head() + b" " * 1000, seconds) for _ in range(40)]

    async def drip_body(head, part):
        connection = hostile.connection()
        try:
            async with asyncio.timeout(seconds):
                await connection.send_raw(head)
                while True:
                    await connection.send_raw(part)
                    await asyncio.sleep(0.5)
        except OSError:
            return "closed"
        except TimeoutError:
            return "open"
        finally:
            connection.abort()

    known = [drip_body(hostile.head(Content_Length=100_000), b" ") for _ in range(30)]
    # Their length is not known in advance, so that room for the largest body might be kept.
    unknown = [drip_body(hostile.head(Transfer_Encoding="chunked"), b"1\r\n \r\n") for _ in range(30)]
    group = asyncio.gather(*unknown, *known, *drips)
    await asyncio.sleep(2)
    hostile.check.expect("trickled requests: another client is answered", await hostile.answers())
    results = await group
    if not hostile.short:
        name = f"trickled headers and bodies are closed within {PATIENCE} s"
        hostile.check.expect(name, "open" not in results, {kind: results.count(kind) for kind in set(results)})


async def flood(hostile):
    """Idle connections, and more requests at once than the queue takes."""
    connections = []
    for _ in range(hostile.times(800)):
        connection = hostile.connection()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                await connection.open()
        connections.append(connection)
    hostile.check.expect(f"{len(connections)} idle connections: the server answers", await hostile.answers())
    for connection in connections:
        connection.abort()

    async def one():
        connection = hostile.connection()
        try:
            value = {"model": hostile.model, "prompt": "a b c", "max_tokens": 4}
            answer = await connection.request("POST", COMPLETIONS, value)
            return answer.status, "retry-after" in answer.headers
        except (OSError, asyncio.IncompleteReadError):
            return "closed", True
        finally:
            connection.close()

    async with asyncio.timeout(300):
        found = await asyncio.gather(*(one() for _ in range(hostile.times(500))))
    counts = {str(status): [code for code, _ in found].count(status) for status in {code for code, _ in found}}
    right = all(status in (200, 429, 503, "closed") for status, _ in found)
    hostile.check.expect("requests at once are answered or refused", right and counts.get("200", 0) > 0, counts)
    hints = all(hint for status, hint in found if status in (429, 503))
    hostile.check.expect("a refusal says when to try again", hints)


async def browsers(hostile):
    """What a page of another site can send without being asked: no answer may be readable, no request may run."""
    body = json.dumps({"model": hostile.model, "prompt": "a", "max_tokens": 1}).encode()
    foreign = {"Origin": "https://evil.example"}

    async def allowed(method, path, headers, data=b""):
        connection = hostile.connection()
        try:
            headers = headers | {"Content-Length": len(data)}
            await connection.send_raw(connection.head(method, path, headers) + data)
            answer = await connection.read()
            return answer.status, "access-control-allow-origin" in answer.headers
        finally:
            connection.abort()

    plain = await allowed("POST", COMPLETIONS, foreign | {"Content-Type": "text/plain"}, body)
    hostile.check.expect("a page of another site: text/plain does not run", plain[0] in (403, 415), plain)
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = await allowed("OPTIONS", COMPLETIONS, foreign | asked)
    hostile.check.expect("a page of another site: its preflight is not granted", not preflight[1], preflight)
    if not hostile.server.key:
        status = await hostile.raw(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        hostile.check.expect("a foreign name for this address (DNS rebinding)", status == 403, status)


async def run_groups(hostile):
    check, server = hostile.check, hostile.server
    await hostile.answers()
    await hostile.idle()
    await asyncio.sleep(1)
    before = {"files": server.open_files(), "threads": server.threads(), "memory": server.memory_mib()}
    groups = [
        malformed_json, invalid_values, malformed_http, huge_bodies, browsers, vanish, slow_readers, flood, trickled,
    ]  # fmt: skip
    for group in groups:
        started = time.monotonic()
        await group(hostile)
        check.expect(f"after `{group.__name__}` the server answers", await hostile.answers())
        print(f"       {group.__name__}: {time.monotonic() - started:.1f} s, {server.memory_mib():.0f} MiB", flush=True)
    check.expect("all places are free", await hostile.idle())
    leaked = None
    for _ in range(200):
        leaked = server.open_files() - before["files"]
        if leaked <= 2:
            break
        await asyncio.sleep(0.1)
    check.expect("no file descriptor is kept", leaked <= 2, f"{before['files']} {leaked:+}")
    # Pools of threads may grow to their limit; a thread for each client would be hundreds.
    threads = server.threads() - before["threads"]
    check.expect("no thread is kept", threads < 24, f"{before['threads']} {threads:+}")
    memory = server.memory_mib()
    check.expect("memory", memory < before["memory"] + 256, f"{before['memory']:.0f} MiB, then {memory:.0f}")
    return {"before": before, "after": {"files": server.open_files(), "threads": server.threads(), "memory": memory}}


def run(server, check, short=False):
    return asyncio.run(run_groups(Hostile(server, check, short)))
