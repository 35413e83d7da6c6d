#!/usr/bin/env python3
"""Renders chat templates with transformers, for the test that compares `moonlight-infer` with them.

    python scripts/parity/check_templates.py [--check]

`fixtures/templates` contains templates in the manner of published ones (`*.jinja`) and expressions, one per line (`expressions.txt`). Each template is
rendered with transformers' `apply_chat_template` machinery over the conversations below, with and without the generation prompt, and
with the mask of its `{% generation %}` blocks; each expression with the variables below. The results are written to `rendered.json` in the
same folder: texts, spans of the mask in characters, or the error. `cargo test -p moonlight-infer --lib chat::tests::templates` then renders
all of it without Python, and prints how many agree. With `--check` nothing is written, and the exit code is 1 if the file differs from the
current results of transformers.

A line of `expressions.txt` that begins with `~refused ` is one that `moonlight-infer` refuses and transformers renders; one with `~differs ` is
rendered differently. The test fails if a mark is no longer true.

Needs: transformers (group `parity`). Takes: seconds.
"""

import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
from common import late

transformers = late("transformers")
machinery = late("transformers.utils", "chat_template_utils")


FOLDER = common.FIXTURES / "templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather of a place, "now" & <soon>.',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Town: é, 月"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C", "description": "Unit"},
                "days": {"type": "array", "items": {"type": "integer"}, "description": "Which days"},
                "exact": {"type": "boolean", "default": False, "description": "True?"},
                "rate": {"type": ["number", "null"], "default": 1e-05, "minimum": 1e16, "description": "Rate"},
                "where": {"type": "object", "additionalProperties": {"type": "number"}, "description": "Map"},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "Time.", "parameters": {"type": "object", "properties": {}}},
}


def call(name, arguments, number=0):
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def says(role, content, **more):
    return {"role": role, "content": content, **more}


ASK, HELLO = says("user", "What's 1+1?"), says("user", "Hello")
ARGUMENTS = {
    "place": 'Celle "north" é',
    "days": [1, 2],
    "exact": True,
    "rate": 2.5e-07,
    "unit": None,
    "n": -3,
    "where": {"x": 1.0},
}
CONVERSATIONS = {
    "plain": {"messages": [ASK, says("assistant", "2.")]},
    "question": {
        "messages": [
            says("system", "Be brief."),
            says("user", "  Who?  \n"),
            says("assistant", " I.\n"),
            says("user", "Why? <b>&'\""),
        ]
    },
    "long": {
        "messages": [
            says("system", " You are 月\n"),
            HELLO,
            says("assistant", "Hi é\n\n\tthere "),
            ASK,
            says("assistant", 'It\'s "2" {{x}}'),
            says("user", "Ok"),
            says("assistant", ""),
        ]
    },
    "calls": {
        "messages": [
            says("user", "Weather?"),
            says("assistant", None, tool_calls=[call("weather", ARGUMENTS)]),
            says("tool", '{"t": 7}', tool_call_id="call00000", name="weather"),
            says("assistant", "7 °C."),
        ],
        "tools": [WEATHER],
    },
    "calls_text": {
        "messages": [
            says("system", "S"),
            says("user", "Weather?"),
            says("assistant", "", tool_calls=[call("weather", '{"place": "Celle"}')]),
            says("tool", "7", tool_call_id="call00000"),
            says("assistant", "7."),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "calls_two": {
        "messages": [
            says("user", "Both?"),
            says("assistant", "I look.", tool_calls=[call("weather", {"place": "A"}), call("clock", {}, 1)]),
            says("tool", "7", tool_call_id="call00000"),
            says("tool", "noon", tool_call_id="call00001"),
            says("assistant", "7 at noon."),
            says("user", "Again"),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "called_map": {
        "messages": [
            says("user", "W?"),
            says("assistant", "", tool_calls=[call("clock", {})]),
            says("tool", {"t": [1, 2.0, None]}, tool_call_id="call00000"),
        ],
        "tools": [CLOCK],
    },
    "reasoning": {
        "messages": [
            ASK,
            says("assistant", "2.", reasoning_content="1 and 1\n"),
            says("user", "And 2+2?"),
            says("assistant", "4.", reasoning_content="\ntwo twos"),
        ]
    },
    "thinking": {
        "messages": [
            ASK,
            says("assistant", "2.", reasoning="one, two"),
            HELLO,
            says("assistant", "<think>\nhm\n</think>\n\nHello."),
        ]
    },
    "reasoning_calls": {
        "messages": [
            says("user", "W?"),
            says("assistant", "", reasoning_content="look", tool_calls=[call("clock", {})]),
            says("tool", "noon", tool_call_id="call00000"),
            says("assistant", "Noon.", reasoning_content="it is noon"),
        ],
        "tools": [CLOCK],
    },
    "parts": {
        "messages": [
            says("system", [{"type": "text", "text": "S"}]),
            says("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]),
            says("assistant", [{"type": "text", "text": "c"}]),
        ]
    },
    "parts_thinking": {
        "messages": [HELLO, says("assistant", [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hi"}])]
    },
    "documents": {
        "messages": [says("user", "Which?"), says("assistant", "The second.")],
        "documents": [{"title": "A <1>", "text": "one"}, {"title": "B", "text": "two\nlines", "score": 0.5}],
        "controls": {"citations": True, "length": None},
    },
    "quick": {
        "messages": [HELLO],
        "enable_thinking": False,
        "thinking": True,
        "thinking_budget": 1000,
        "thinking_on": True,
        "reasoning_effort": "low",
        "today": "Monday",
    },
    "system_off": {
        "messages": [says("system", "Do it. /no_think"), HELLO, says("assistant", "\n\nHi")],
        "enable_thinking": True,
    },
    "builtin": {
        "messages": [
            HELLO,
            says("assistant", None, tool_calls=[call("search", {"q": "x", "k": "y"})]),
            says("ipython", "r"),
        ],
        "builtin_tools": ["search", "code_interpreter"],
        "tools_in_user_message": False,
        "tools": [CLOCK],
    },
    "two_users": {"messages": [HELLO, ASK, says("assistant", "2.")]},
    "no_user": {"messages": [says("system", "S"), says("assistant", "A")]},
    "late_system": {"messages": [HELLO, says("system", "Now in French."), says("assistant", "Oui.")]},
    "named": {"messages": [says("user", "Q", name="Ada"), says("assistant", "A", name="Bot", prefix=True)]},
    "message_tools": {
        "messages": [says("system", "S", tools='[{"name": "f"}]', metadata="m"), HELLO, says("assistant", "A")]
    },
    "empty": {"messages": []},
}

VARIABLES = {
    "s": "Hello <World> & 'you' \"x\" é月🌙",
    "e": "",
    "n": None,
    "t": True,
    "f": False,
    "i": 3,
    "neg": -7,
    "big": 12345678901234567890,
    "huge": 1e20,
    "x": 1.5,
    "x2": 2.0,
    "tiny": 0.00001,
    "l": [1, 2, 3],
    "ls": ["b", "a", "C"],
    "d": {"b": 1, "a": [1, {"z": None, "y": True}], "items": {"k": "v"}, "get": "G"},
    "m": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "ho",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": 1, "b": "x"}}}],
        },
    ],
    "ws": "  a b\n c  ",
    "nl": "a\nb\n\nc",
    "q": "it's",
    "qq": 'it\'s "q"',
    "esc": "a\\b\t\u0001\u007f\u00a0\u200b",
}


def rendered(template, messages, prompt=False, mask=False, **variables):
    """The text and the spans of the mask, or the error."""
    try:
        texts, spans = machinery.render_jinja_template(
            conversations=[machinery._normalize_chat_messages(messages)],
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=mask,
            **variables,
        )
        return {"text": texts[0], **({"spans": spans[0]} if mask else {})}
    except Exception as error:  # whatever a template raises
        return {"error": re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")[:200]}


def main():
    arguments = common.parser(__doc__)
    arguments.add_argument("--check", action="store_true", help="write nothing, compare")
    arguments = arguments.parse_args()
    templates = {}
    for path in sorted(FOLDER.glob("*.jinja")):
        template, cases = path.read_text(), {}
        for name, given in CONVERSATIONS.items():
            variables = {**TOKENS, "date_string": "26 Jul 2024", **given}
            messages = variables.pop("messages")
            cases[name] = [
                rendered(template, messages, prompt, "{% generation %}" in template and not prompt, **variables)
                for prompt in (False, True)
            ]
        templates[path.stem] = cases
    expressions = []
    for line in (FOLDER / "expressions.txt").read_text().splitlines():
        known = re.match(r"~(refused|differs) ", line)
        source = line[known.end() :] if known else line
        if source:
            expressions.append(
                {"source": source, **({"ours": known[1]} if known else {}), **rendered(source, [], **VARIABLES)}
            )
    everything = {
        "transformers": transformers.__version__,
        "tokens": TOKENS,
        "conversations": CONVERSATIONS,
        "templates": templates,
        "variables": VARIABLES,
        "expressions": expressions,
    }
    # One line for each rendering, so that a change is a short diff.
    text = re.sub(r"\n {4,}", " ", json.dumps(everything, ensure_ascii=False, indent=1)) + "\n"
    path = FOLDER / "rendered.json"
    cases = [case for cases in templates.values() for pair in cases.values() for case in pair]
    errors = sum("error" in case for case in cases)
    print(
        f"transformers {transformers.__version__}: {len(templates)} templates, {len(cases)} renderings, {errors} of them errors; {len(expressions)} expressions"
    )
    if arguments.check:
        same = path.read_text() == text
        print(f"{path} is {'as' if same else 'NOT as'} transformers renders it")
        sys.exit(0 if same else 1)
    path.write_text(text)


if __name__ == "__main__":
    main()
