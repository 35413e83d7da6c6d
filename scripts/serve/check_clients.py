#!/usr/bin/env python3
"""Runs other people's clients, unchanged, against `moonlight serve`: the command-line program `llm`, and from npm `openai` and Vercel's AI SDK.

    python scripts/serve/check_clients.py --moonlight target/release/moonlight --node DIR

`llm` gets the server by its own `extra-openai-models.yaml`. For the others DIR contains `node_modules`:

    mkdir DIR && cd DIR && npm install openai@6.49.0 ai@6.0.326 @ai-sdk/openai-compatible@2.0.92

The model is the tiny one of `tiny_model.py`, whose answers are known. Compared are whole and streamed answers, a conversation over several calls,
a call of a tool and the answer to its result, errors by their class, and a stream that is aborted.

Needs: llm (group `serve`), Node.js with the packages above, the built `moonlight`. Takes: 1 minute, and 1 to train the model.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import server as serving
import tiny_model

KEY = "secret-of-the-check"
MODELS = """\
- model_id: tiny
  model_name: {name}
  api_base: {url}/v1
  api_key_name: moonlight
  supports_tools: true
  can_stream: true
"""
FUNCTION = "def get_weather(city: str) -> str:\n    return 'rain'\n"


def check_llm(check, server, home):
    """The program `llm` with a folder of its own."""
    name = json.loads(server.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})[2])["data"][0]["id"]
    home.mkdir()
    (home / "extra-openai-models.yaml").write_text(MODELS.format(name=name, url=server.url))
    (home / "keys.json").write_text(json.dumps({"moonlight": KEY}))
    environment = os.environ | {"LLM_USER_PATH": str(home)}

    def llm(*arguments):
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        return done.stdout.strip() if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-500:]}"

    def equal(what, found, expected):
        check.expect(f"llm: {what}", found == expected, "" if found == expected else f"{found!r}, not {expected!r}")

    options = ("-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "250")
    print(llm("--version"), flush=True)
    (count, counted), (moon, mooned) = tiny_model.COUNT, tiny_model.MOON
    equal("streamed", llm(*options, moon), mooned)
    equal("whole", llm(*options, "--no-stream", moon), mooned)
    equal("with a system prompt", llm(*options, "-s", tiny_model.SYSTEM, count), counted)
    again = llm(*options, "-c", count)
    check.expect("llm: a second turn of the conversation", again and not again.startswith("exit"), again[:100])
    called = llm(*options, "--functions", FUNCTION, tiny_model.ASK_TOOL)
    equal("a tool is called, and its result answered", called, tiny_model.AFTER_TOOL)
    refused = llm("-m", "tiny", "-o", "temperature", "2", "-o", "top_p", "1", "-o", "stop", "five", count)
    check.expect("llm: `stop`", "five" not in refused and not refused.startswith("exit"), refused[:200])


def check_node(check, server, folder):
    script = pathlib.Path(__file__).with_name("node_clients.mjs")
    found = common.measure("node", script, folder, server.url, KEY, json.dumps(tiny_model.TOOL))
    print(json.dumps(found, ensure_ascii=False), flush=True)
    expected = {
        "whole": tiny_model.COUNT[1],
        "streamed": tiny_model.MOON[1],
        "completion": "string",
        "afterTool": tiny_model.AFTER_TOOL,
        "badRequest": "BadRequestError 400",
        "notFound": "NotFoundError 404",
        "wrongKey": "AuthenticationError 401",
        "sdkWhole": tiny_model.COUNT[1],
        "sdkStreamed": tiny_model.MOON[1],
    }
    for key, value in expected.items():
        check.expect(f"npm: {key}", found.get(key) == value, "" if found.get(key) == value else repr(found.get(key)))
    # Pieces that had arrived when the stream was aborted are still delivered.
    check.expect("npm: a stream is aborted", 5 <= found["beforeAbort"] < 600, found["beforeAbort"])
    tool = found.get("tool") or {}
    check.expect("npm: the call of a tool", json.loads(tool.get("arguments", "null")) == {"city": "Oslo"}, tool)


def main():
    parser = common.parser(__doc__)
    serving.add_arguments(parser)
    parser.add_argument("--node", type=pathlib.Path, help="a folder with `node_modules`; without it only `llm` runs")
    options = parser.parse_args()
    check = common.Checks()
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        model = options.model or tiny_model.make(options.moonlight, home / "tiny")
        with serving.Server.moonlight(options.moonlight, model, "--api-key", KEY, key=KEY) as server:
            check_llm(check, server, home / "llm")
            if options.node:
                check_node(check, server, options.node.resolve())
            check.expect("the server lives", server.alive())
    check.finish()


if __name__ == "__main__":
    main()
