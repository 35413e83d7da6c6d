#!/usr/bin/env python3
"""Runs OpenAI's own Python client, unchanged, against `moonlight serve`.

    python scripts/serve/check_openai.py --moonlight target/release/moonlight
    python scripts/serve/check_openai.py --url http://127.0.0.1:8080 --api-key KEY

The model is the tiny one of `tiny_model.py`, whose answers are known: so the script checks what comes back, not only its form. Models, chat and
completions, streamed and whole, `n`, `stop`, `seed`, `logprobs`, `echo`, tools, usage, the client's exception for each error, 16 requests at once,
and requests that are cancelled in the middle. Log-probabilities are compared with `moonlight score`. `--url` checks a server that serves
the tiny model and runs already.

Needs: openai (group `serve`), the built `moonlight`. Takes: 1 minute, and 1 to train the model.
"""

import asyncio
import json
import math
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import server as serving
import tiny_model
from common import late

openai = late("openai")

KEY = "secret-of-the-check"
COUNT, COUNT_ANSWER = tiny_model.COUNT
MOON, MOON_ANSWER = tiny_model.MOON
END = 0xF5  # `<|im_end|>` of `bytes-chat`
LOGPROB = 2e-4


def ask(text, system=None):
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": text}]


def rendered(text):
    """What the template makes of one question, as the completions endpoint reads it."""
    return (
        "<|im_system|>system<|im_middle|>You are Kimi.<|im_end|><|im_user|>user<|im_middle|>"
        f"{text}<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )


def tokens_of(text):
    """`bytes-chat`: five special tokens, otherwise bytes."""
    for name, token in {"im_end": 0xF5, "im_user": 0xF6, "im_assistant": 0xF7, "im_system": 0xF8}.items():
        text = text.replace(f"<|{name}|>", chr(0xE000 + token))
    text = text.replace("<|im_middle|>", chr(0xE0F9))
    found = []
    for letter in text:
        if 0xE000 <= ord(letter) <= 0xE0FF:
            found.append(ord(letter) - 0xE000)
        else:
            found.extend(letter.encode())
    return found


class Check(common.Checks):
    """The comparisons of this script, with one client and one model's name."""

    def __init__(self, client, model):
        super().__init__()
        self.client, self.model = client, model

    def chat(self, messages, **options):
        options = {"model": self.model, "temperature": 0, "max_tokens": 100} | options
        return self.client.chat.completions.create(messages=messages, **options)

    def complete(self, prompt, **options):
        options = {"model": self.model, "temperature": 0, "max_tokens": 100} | options
        return self.client.completions.create(prompt=prompt, **options)

    def equal(self, name, found, expected):
        return self.expect(name, found == expected, "" if found == expected else f"{found!r}, not {expected!r}")

    def fails(self, name, kind, call, *mentions):
        """Whether a call raises the client's exception of that name, with an `error` object that mentions all of the words."""
        try:
            found = call()
            if hasattr(found, "__iter__") and not hasattr(found, "choices"):
                found = list(found)
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            text = f"{body.get('message')} {body.get('param')} {body.get('code')}"
            right = type(error).__name__ == kind and {"message", "type", "param", "code"} <= body.keys()
            missing = [word for word in mentions if word not in text]
            self.expect(f"{name}: {kind}", right and not missing, f"{type(error).__name__} {error.status_code} {text}")
        except openai.APIError as error:
            self.expect(f"{name}: {kind}", False, f"{type(error).__name__} {error}")
        else:
            self.expect(f"{name}: {kind}", False, f"an answer: {str(found)[:200]}")


def check_models(check):
    names = [model.id for model in check.client.models.list()]
    check.expect("models.list names the model", check.model in names, names)
    check.equal("models.retrieve", check.client.models.retrieve(check.model).id, check.model)
    check.fails("models.retrieve of another", "NotFoundError", lambda: check.client.models.retrieve("no-such-model"))


def check_chat(check):
    answer = check.chat(ask(COUNT))
    choice, usage = answer.choices[0], answer.usage
    check.equal("chat: content", choice.message.content, COUNT_ANSWER)
    check.equal("chat: role", choice.message.role, "assistant")
    check.equal("chat: finish_reason at the end", choice.finish_reason, "stop")
    check.equal("chat: object, model", (answer.object, answer.model), ("chat.completion", check.model))
    check.expect("chat: id and time", answer.id.startswith("chatcmpl-") and abs(answer.created - time.time()) < 60)
    check.equal("chat: prompt_tokens", usage.prompt_tokens, len(tokens_of(rendered(COUNT))))
    # The token that ends the answer counts or does not; both are in use.
    check.expect("chat: completion_tokens", usage.completion_tokens - len(COUNT_ANSWER) in (0, 1), usage)
    check.equal("chat: total_tokens", usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    check.equal("chat: letters of several bytes", check.chat(ask(MOON)).choices[0].message.content, MOON_ANSWER)
    system = check.chat(ask(COUNT, tiny_model.SYSTEM)).choices[0].message.content
    check.equal("chat: a system message", system, COUNT_ANSWER)
    parts = [{"role": "user", "content": [{"type": "text", "text": COUNT}]}]
    check.equal("chat: content in parts", check.chat(parts).choices[0].message.content, COUNT_ANSWER)
    for name in ("max_tokens", "max_completion_tokens"):
        options = {"max_tokens": openai.NOT_GIVEN} | {name: 5}
        short = check.chat(ask(COUNT), **options)
        found = (short.choices[0].message.content, short.choices[0].finish_reason, short.usage.completion_tokens)
        check.equal(f"chat: {name}", found, (COUNT_ANSWER[:5], "length", 5))
    default = check.chat(ask(COUNT), max_tokens=openai.NOT_GIVEN).choices[0]
    check.equal(
        "chat: without max_tokens, to the end", (default.message.content, default.finish_reason), (COUNT_ANSWER, "stop")
    )
    again = check.chat(ask(COUNT))
    cached = again.usage.prompt_tokens_details and again.usage.prompt_tokens_details.cached_tokens
    check.expect("chat: usage counts the reused prefix", (cached or 0) > 0, again.usage.prompt_tokens_details)
    biased = check.chat(ask(COUNT), max_tokens=4, logit_bias={str(ord("Z")): 100}).choices[0].message.content
    check.equal("chat: logit_bias", biased, "ZZZZ")
    banned = check.chat(ask(COUNT), logit_bias={str(ord("o")): -100}).choices[0].message.content
    check.expect("chat: logit_bias bans a token", "o" not in banned, banned)


def collect(stream):
    """The text of each choice, its finish reason, the chunks, and the usage of a stream."""
    texts, reasons, chunks, usage = {}, {}, [], None
    for chunk in stream:
        chunks.append(chunk)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts.setdefault(choice.index, []).append(piece or "")
            if choice.finish_reason:
                reasons.setdefault(choice.index, []).append(choice.finish_reason)
    return texts, reasons, chunks, usage


def check_streaming(check):
    for question, expected in (COUNT, COUNT_ANSWER), (MOON, MOON_ANSWER):
        whole = check.chat(ask(question)).usage
        found = collect(check.chat(ask(question), stream=True, stream_options={"include_usage": True}))
        texts, reasons, chunks, usage = found
        check.equal(f"stream of `{question}`: text", "".join(texts[0]), expected)
        check.equal(f"stream of `{question}`: one finish_reason", reasons, {0: ["stop"]})
        check.expect(f"stream of `{question}`: several pieces", sum(map(bool, texts[0])) > 5, len(texts[0]))
        check.expect(f"stream of `{question}`: no broken letters", all("\ufffd" not in piece for piece in texts[0]))
        check.equal(
            f"stream of `{question}`: the first chunk has the role", chunks[0].choices[0].delta.role, "assistant"
        )
        check.expect(f"stream of `{question}`: one id", len({chunk.id for chunk in chunks}) == 1)
        check.expect(f"stream of `{question}`: usage is in a last chunk without choices", not chunks[-1].choices)
        counts = [(count.prompt_tokens, count.completion_tokens) for count in (usage, whole) if count]
        check.expect(f"stream of `{question}`: usage as without streaming", len(set(counts)) == 1, counts)
    plain = collect(check.chat(ask(COUNT), stream=True))
    check.expect("stream: no usage unless asked for", plain[3] is None, plain[3])
    first = check.chat(ask(COUNT), stream=True)
    started = time.monotonic()
    next(iter(first))
    early = time.monotonic() - started
    for _ in first:
        pass
    total = time.monotonic() - started
    check.expect("stream: the first piece comes before the end", early < total, f"{early:.3f} of {total:.3f} s")
    cut = collect(check.chat(ask(MOON), stream=True, max_tokens=len("Der Mond scheint ü".encode()) - 1))
    text = "".join(cut[0][0])
    check.expect(
        "stream: cut within a letter", text.rstrip("\ufffd") == "Der Mond scheint " and cut[1] == {0: ["length"]}, text
    )
    texts, reasons, _, _ = collect(check.complete(rendered(COUNT), stream=True))
    check.equal("completions, streamed", ("".join(texts[0]), reasons), (COUNT_ANSWER, {0: ["stop"]}))
    with check.client.chat.completions.stream(model=check.model, messages=ask(COUNT), temperature=0) as events:
        final = events.get_final_completion()
    check.equal("the client's stream helper", final.choices[0].message.content, COUNT_ANSWER)


def check_stop(check):
    for stop, expected in [
        ("five", "one two three four "),
        (["nope", "six", "three"], "one two "),
        (["e f"], "one two thre"),
        (["one"], ""),
        (["ten!"], COUNT_ANSWER),
        (["tw", "two", "o t"], "one "),
    ]:
        whole = check.chat(ask(COUNT), stop=stop).choices[0]
        check.equal(f"stop={stop}", (whole.message.content, whole.finish_reason), (expected, "stop"))
        texts, reasons, _, _ = collect(check.chat(ask(COUNT), stop=stop, stream=True))
        check.equal(f"stop={stop}, streamed", ("".join(texts[0]), reasons), (expected, {0: ["stop"]}))
    moon = check.complete(rendered(MOON), stop="照").choices[0].text
    check.equal("stop: a letter of three bytes", moon, MOON_ANSWER.partition("照")[0])


def check_sampling(check):
    # The tiny model is sure of its answer at lower temperatures.
    hot = {"temperature": 6, "max_tokens": 40, "logit_bias": {str(END): -100, "257": -100}}

    def several(**options):
        return [choice.message.content for choice in check.chat(ask(COUNT), **(hot | options)).choices]

    first = several(seed=7)
    check.equal("seed: repeats", several(seed=7), first)
    check.expect("seed: another seed, another text", several(seed=8) != first)
    three = several(seed=7, n=3)
    check.expect("n=3: three choices that differ", len(set(three)) == 3, three)
    check.equal("n=3 with a seed repeats", several(seed=7, n=3), three)
    texts, reasons, _, _ = collect(check.chat(ask(COUNT), stream=True, n=3, seed=7, **hot))
    check.equal("n=3, streamed", ["".join(texts[index]) for index in sorted(texts)], three)
    check.equal("n=3, streamed: each ends once", reasons, {index: ["length"] for index in range(3)})
    greedy = check.chat(ask(COUNT), n=2)
    check.equal("n=2, greedy", [choice.message.content for choice in greedy.choices], [COUNT_ANSWER] * 2)
    check.expect("n=2: usage counts both", greedy.usage.completion_tokens >= 2 * len(COUNT_ANSWER), greedy.usage)
    nucleus = check.chat(ask(COUNT), temperature=1.5, top_p=1e-6).choices[0].message.content
    check.equal("top_p of almost 0 is greedy", nucleus, COUNT_ANSWER)
    repeated = check.chat(ask(COUNT), max_tokens=60, frequency_penalty=2, presence_penalty=2).choices[0].message
    check.expect("penalties change the text", repeated.content != COUNT_ANSWER, repeated.content)


def check_logprobs(check, scores):
    answer = check.chat(ask(MOON), logprobs=True, top_logprobs=5)
    entries = answer.choices[0].logprobs.content
    joined = b"".join(bytes(entry.bytes or []) for entry in entries)
    # The entry of the token that ends the answer may be there; it has no text.
    check.expect("logprobs: their bytes are the text", joined.startswith(MOON_ANSWER.encode()), joined)
    check.expect("logprobs: one entry for each token", len(entries) - len(MOON_ANSWER.encode()) in (0, 1), len(entries))
    check.expect("logprobs: five alternatives each", all(len(entry.top_logprobs) == 5 for entry in entries))
    sums = [math.fsum(math.exp(top.logprob) for top in entry.top_logprobs) for entry in entries]
    check.expect("logprobs: probabilities of at most 1", max(sums) <= 1 + 1e-5, max(sums))
    check.expect(
        "logprobs: the greedy token is the first alternative",
        all(
            entry.top_logprobs[0].logprob == entry.logprob == max(top.logprob for top in entry.top_logprobs)
            for entry in entries
        ),
    )
    streamed = [
        entry.logprob
        for chunk in check.chat(ask(MOON), logprobs=True, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content or []
    ]
    whole = [entry.logprob for entry in entries]
    worst = max((abs(a - b) for a, b in zip(streamed, whole)), default=math.inf)
    check.expect("logprobs: streamed", len(streamed) == len(whole) and worst < 1e-5, f"{len(streamed)}, {worst:.1e}")
    hot = check.chat(ask(COUNT), logprobs=True, temperature=1.3, seed=1, max_tokens=1).choices[0].logprobs.content[0]
    cold = check.chat(ask(COUNT), logprobs=True, top_logprobs=20, max_tokens=1).choices[0].logprobs.content[0]
    same = [top.logprob for top in cold.top_logprobs if top.token == hot.token]
    check.expect("logprobs: before the temperature", any(abs(value - hot.logprob) < 1e-4 for value in same) or not same)

    prompt = rendered(MOON)
    echoed = check.complete(prompt, echo=True, logprobs=2, max_tokens=8)
    choice = echoed.choices[0]
    found = choice.logprobs
    count = len(tokens_of(prompt)) + 8
    check.expect("echo: the text begins with the prompt", choice.text.endswith(MOON_ANSWER[:8]), choice.text[-30:])
    lengths = [len(values) for values in (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)]
    check.equal("echo: logprobs of prompt and answer", lengths, [count] * 4)
    check.expect("echo: the first token has none", found.token_logprobs[0] is None and not found.top_logprobs[0])
    check.expect("echo: offsets increase", found.text_offset == sorted(found.text_offset))
    check.expect("echo: two alternatives each", all(2 <= len(top) <= 3 for top in found.top_logprobs[1:]))
    check.expect("logprobs are at most 0", all(value <= 0 for value in found.token_logprobs[1:]))
    if scores:
        expected = scores([*tokens_of(prompt), *MOON_ANSWER.encode()[:8]])
        worst = max(abs(a - b) for a, b in zip(found.token_logprobs[1:], expected[1:], strict=True))
        check.expect("echo: logprobs of `moonlight score`", worst < LOGPROB, f"{worst:.1e}")
    only = check.complete(tokens_of(prompt), echo=True, logprobs=0, max_tokens=0).choices[0]
    worst = max(abs(a - b) for a, b in zip(only.logprobs.token_logprobs[1:], found.token_logprobs[1:]))
    check.expect("echo with max_tokens=0 only scores", len(only.logprobs.tokens) == count - 8 and worst < 1e-5, worst)


def check_completions(check):
    text = rendered(COUNT)
    answer = check.complete(text)
    check.equal("completions: text", answer.choices[0].text, COUNT_ANSWER)
    check.equal("completions: object", answer.object, "text_completion")
    check.equal("completions: usage", answer.usage.prompt_tokens, len(tokens_of(text)))
    check.equal("completions: token ids", check.complete(tokens_of(text)).choices[0].text, COUNT_ANSWER)
    for name, prompts in [
        ("texts", [text, rendered(MOON)]),
        ("lists of ids", [tokens_of(text), tokens_of(rendered(MOON))]),
    ]:
        several = check.complete(prompts, n=2)
        found = [choice.text for choice in sorted(several.choices, key=lambda choice: choice.index)]
        check.equal(f"completions: two {name}, n=2", found, [COUNT_ANSWER] * 2 + [MOON_ANSWER] * 2)
    default = check.complete(text, max_tokens=openai.NOT_GIVEN).choices[0]
    check.equal(
        "completions: 16 tokens by default", (default.text, default.finish_reason), (COUNT_ANSWER[:16], "length")
    )


def check_tools(check):
    options = {"tools": [tiny_model.TOOL], "max_tokens": 200}
    answer = check.chat(ask(tiny_model.ASK_TOOL), **options).choices[0]
    call = (answer.message.tool_calls or [None])[0]
    if check.expect("tools: a call", call is not None and answer.finish_reason == "tool_calls", answer):
        check.equal("tools: name", call.function.name, tiny_model.CALL["name"])
        check.equal("tools: arguments", json.loads(call.function.arguments), json.loads(tiny_model.CALL["arguments"]))
        check.expect("tools: id, type, no content", call.id and call.type == "function" and not answer.message.content)
        history = [*ask(tiny_model.ASK_TOOL), answer.message.model_dump(exclude_none=True)]
        history.append({"role": "tool", "tool_call_id": call.id, "content": tiny_model.TOOL_RESULT})
        final = check.chat(history, **options).choices[0]
        check.equal("tools: the answer to the result", final.message.content, tiny_model.AFTER_TOOL)
    name, arguments, reasons, text, ids = "", "", [], "", set()
    for chunk in check.chat(ask(tiny_model.ASK_TOOL), stream=True, **options):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] * bool(choice.finish_reason)
            for piece in choice.delta.tool_calls or []:
                ids |= {piece.id} - {None}
                name += (piece.function and piece.function.name) or ""
                arguments += (piece.function and piece.function.arguments) or ""
    found = (name, arguments, reasons, text, len(ids))
    check.equal(
        "tools, streamed", found, (tiny_model.CALL["name"], tiny_model.CALL["arguments"], ["tool_calls"], "", 1)
    )
    none = check.chat(ask(COUNT), tool_choice="none", **options).choices[0]
    check.expect("tool_choice=none: no call", not none.message.tool_calls, none.message)
    plain = check.chat(ask(COUNT)).choices[0]
    check.expect("without tools: no call", plain.message.tool_calls is None, plain.message.tool_calls)


def check_errors(check):
    long = "x" * 5000
    check.fails(
        "another model", "NotFoundError", lambda: check.chat(ask(COUNT), model="no-such-model"), "no-such-model"
    )
    check.fails("no messages", "BadRequestError", lambda: check.chat([]), "messages")
    check.fails("temperature below 0", "BadRequestError", lambda: check.chat(ask(COUNT), temperature=-1), "temperature")
    check.fails("top_p of 2", "BadRequestError", lambda: check.chat(ask(COUNT), top_p=2), "top_p")
    check.fails("n of 0", "BadRequestError", lambda: check.chat(ask(COUNT), n=0), "n")
    check.fails("n of 100000", "BadRequestError", lambda: check.chat(ask(COUNT), n=100_000), "n")
    check.fails("max_tokens below 0", "BadRequestError", lambda: check.chat(ask(COUNT), max_tokens=-1), "max_tokens")
    check.fails("top_logprobs without logprobs", "BadRequestError", lambda: check.chat(ask(COUNT), top_logprobs=3))
    check.fails(
        "top_logprobs of 1000",
        "BadRequestError",
        lambda: check.chat(ask(COUNT), logprobs=True, top_logprobs=1000),
        "logprobs",
    )
    check.fails("a longer prompt than the context", "BadRequestError", lambda: check.chat(ask(long)))
    check.fails(
        "logit_bias of an unknown token", "BadRequestError", lambda: check.chat(ask(COUNT), logit_bias={"99999": 1})
    )
    check.fails("an unknown token id", "BadRequestError", lambda: check.complete([1, 2, 99999]))
    check.fails("an empty prompt", "BadRequestError", lambda: check.complete([]))
    check.fails(
        "an unknown field",
        "BadRequestError",
        lambda: check.chat(ask(COUNT), extra_body={"no_such_field": 1}),
        "no_such_field",
    )
    check.fails("a wrong type", "BadRequestError", lambda: check.chat(ask(COUNT), extra_body={"temperature": "hot"}))
    check.fails(
        "response_format json_schema",
        "BadRequestError",
        lambda: check.chat(
            ask(COUNT), response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
        ),
        "response_format",
    )
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aa"}}]
    check.fails("a picture", "BadRequestError", lambda: check.chat([{"role": "user", "content": picture}]), "image_url")
    named = {"type": "function", "function": {"name": tiny_model.CALL["name"]}}
    for choice in ("required", named):
        tools = {"tools": [tiny_model.TOOL], "tool_choice": choice}
        check.fails(
            "tool_choice that forces a call",
            "BadRequestError",
            lambda tools=tools: check.chat(ask(COUNT), **tools),
            "tool_choice",
        )
    check.fails("suffix", "BadRequestError", lambda: check.complete("a", suffix="b"), "suffix")
    check.fails("errors of a stream", "BadRequestError", lambda: check.chat(ask(COUNT), stream=True, temperature=-1))
    check.fails("responses", "NotFoundError", lambda: check.client.responses.create(model=check.model, input="hello"))
    check.fails("embeddings", "NotFoundError", lambda: check.client.embeddings.create(model=check.model, input="hello"))
    if check.client.api_key == KEY:
        stranger = check.client.with_options(api_key="wrong")
        check.fails("a wrong key", "AuthenticationError", lambda: stranger.models.list())


async def check_concurrent(check, url, key):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:

        async def one(index):
            question, expected = (COUNT, COUNT_ANSWER) if index % 2 else (MOON, MOON_ANSWER)
            stream = index % 3 == 0
            answer = await client.chat.completions.create(
                model=check.model, messages=ask(question), temperature=0, max_tokens=100, stream=stream
            )
            if not stream:
                return answer.choices[0].message.content == expected
            text = ""
            async for chunk in answer:
                text += (chunk.choices and chunk.choices[0].delta.content) or ""
            return text == expected

        right = await asyncio.gather(*map(one, range(16)))
        check.expect("16 at once: every answer is the one it has alone", all(right), sum(right))


def idle(server, seconds=20):
    """Whether the server has no request running or waiting within that time."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if serving.busy(server) == 0:
            return True
        time.sleep(0.05)
    return False


def check_cancel(check, server):
    endless = {"logit_bias": {str(END): -100}, "max_tokens": 800}
    for _ in range(10):
        stream = check.chat(ask(COUNT), stream=True, **endless)
        for number, _ in enumerate(stream):
            if number == 5:
                break
        stream.close()
    check.expect("ten streams closed in the middle: their places are free", idle(server), serving.busy(server))
    try:
        # Not streamed, and given up after a moment.
        check.client.with_options(timeout=0.15, max_retries=0).chat.completions.create(
            model=check.model, messages=ask(COUNT), temperature=0, **endless
        )
        check.expect("a request that is given up", False, "it was answered within 0.15 s")
    except openai.APITimeoutError:
        check.expect("a request that is given up frees its place", idle(server), serving.busy(server))
    check.equal("afterwards the server answers", check.chat(ask(COUNT)).choices[0].message.content, COUNT_ANSWER)


def scorer(program, model):
    """Log-probabilities of tokens by `moonlight score`."""

    def scores(tokens):
        with tempfile.TemporaryDirectory() as home:
            data = pathlib.Path(home, "tokens.jsonl")
            data.write_text(json.dumps({"tokens": tokens}) + "\n")
            line = common.call(program, "score", "--model", model, "--data", data, "--dtype", "f32", "--device", "cpu")
        return json.loads(line)["logprobs"]

    return scores


def run(server, key, scores=None):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)
    check = Check(client, client.models.list().data[0].id)
    parts = [
        check_models,
        check_chat,
        check_streaming,
        check_stop,
        check_sampling,
        lambda check: check_logprobs(check, scores),
        check_completions,
        check_tools,
        check_errors,
        lambda check: asyncio.run(check_concurrent(check, server.url, key)),
        lambda check: check_cancel(check, server),
    ]
    for part in parts:
        try:
            part(check)
        except Exception as error:
            # The other parts are worth knowing.
            check.expect("a part ends early", False, f"{type(error).__name__}: {error}")
    return check


def main():
    parser = common.parser(__doc__)
    serving.add_arguments(parser)
    parser.add_argument("--url", help="a running server of the tiny model")
    parser.add_argument("--api-key", default=KEY)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        scores = None
        if options.url:
            server = serving.Server(url=options.url, key=options.api_key)
        else:
            model = tiny_model.make(options.moonlight, options.model or pathlib.Path(home, "tiny"))
            scores = scorer(options.moonlight, model)
            key = {"key": options.api_key}
            server = serving.Server.moonlight(options.moonlight, model, "--api-key", options.api_key, **key)
        with server:
            print(f"openai {openai.__version__}", flush=True)
            check = run(server, options.api_key, scores)
            check.expect("the server lives", server.alive())
    check.finish()


if __name__ == "__main__":
    main()
