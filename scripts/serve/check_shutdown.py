#!/usr/bin/env python3
"""Ends `moonlight serve` by SIGTERM while requests run, and checks that they are finished and new ones refused.

    python scripts/serve/check_shutdown.py --moonlight target/release/moonlight

Streams that run when the signal arrives must end with all their tokens and `data: [DONE]`; new connections are refused or answered 503; the
exit code is 0, and there is no error in the log. A second signal ends the server at once.

Needs: the built `moonlight`. Takes: half a minute, and 1 to train the model.
"""

import asyncio
import pathlib
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import load_test
import server as serving
import tiny_model
from http_client import Connection

NEW = 500


def endless(server, new=NEW):
    return {
        "model": load_test.model_name(server),
        "prompt": "one",
        "max_tokens": new,
        "ignore_eos": True,
        "temperature": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def finishes(server, check):
    value = endless(server)
    connections = [Connection(server.host, server.port) for _ in range(4)]
    for connection in connections:
        await connection.send("POST", "/v1/completions", value)
    tasks = [asyncio.create_task(connection.read()) for connection in connections]
    await asyncio.sleep(0.2)
    running = sum(not task.done() for task in tasks)
    check.expect("four streams run when the signal arrives", running == 4, running)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.05)
    try:
        late = await Connection(server.host, server.port).request("POST", "/v1/completions", value)
        check.expect("a request after the signal is refused", late.status == 503, late.status)
    except (OSError, asyncio.IncompleteReadError):
        check.expect("a request after the signal is refused", True, "no connection")
    answers = await asyncio.gather(*tasks)
    tokens = [(answer.events[-1][1].get("usage") or {}).get("completion_tokens") for answer in answers]
    check.expect("the streams are finished", tokens == [NEW] * 4, tokens)
    status = await asyncio.to_thread(server.process.wait, 30)
    check.expect("exit code 0", status == 0, status)
    check.expect("no error in the log", "error" not in server.said().lower(), server.said()[-300:])


async def ends_at_once(server, check):
    connection = Connection(server.host, server.port)
    await connection.send("POST", "/v1/completions", endless(server, 900))
    await connection.read_head()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.1)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status = await asyncio.to_thread(server.process.wait, 30)
    seconds = time.monotonic() - started
    # As after a signal that no handler takes, or with the exit code of an interrupted program.
    ended = status in (-signal.SIGTERM, 130)
    check.expect("a second signal ends it at once", ended and seconds < 2, f"{status}, {seconds:.2f} s")
    connection.abort()


def main():
    parser = common.parser(__doc__)
    serving.add_arguments(parser)
    options = parser.parse_args()
    check = common.Checks()
    with tempfile.TemporaryDirectory() as home:
        model = options.model or tiny_model.make(options.moonlight, pathlib.Path(home, "tiny"))
        for part in (finishes, ends_at_once):
            with serving.Server.moonlight(options.moonlight, model) as server:
                asyncio.run(part(server, check))
    check.finish()


if __name__ == "__main__":
    main()
