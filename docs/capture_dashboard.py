"""Draws the dashboard of a run, as a terminal shows it, into an SVG.

    python docs/capture_dashboard.py target/release/moonlight docs/src/images/dashboard.svg [--steps 150] [--keys LLL]

Runs `moonlight train configs/quickstart.toml` in a pseudo terminal of 120 x 36 cells, presses keys, and draws the last screen.
Lines of boxes, Braille dots and blocks are drawn as shapes, not as letters, so that the picture does not depend on a font.
Needs `pyte` (0.8) and the time of that many steps: about 0.5 s each on two cores.
"""

import argparse
import fcntl
import html
import os
import pathlib
import pty
import select
import shutil
import struct
import subprocess
import tempfile
import termios
import time

import pyte

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS, LINES = 120, 36
WIDTH, HEIGHT = 9.0, 19.0  # of a cell
PAD, BAR = 14.0, 30.0

FOREGROUND, BACKGROUND = "#d7dae0", "#1e2127"
COLORS = {
    "black": "#3b4048", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b", "yellow": "#e5c07b", "blue": "#61afef",
    "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#d7dae0", "brightblack": "#7f848e", "brightred": "#ef8891",
    "brightgreen": "#b5d99c", "brightbrown": "#f0d399", "brightyellow": "#f0d399", "brightblue": "#8cc5f6",
    "brightmagenta": "#d9a0ea", "brightcyan": "#83ced7", "brightwhite": "#ffffff",
}  # fmt: skip
# Which sides of a cell a sign of a box touches: left, right, up, down.
BOXES = {"─": "lr", "│": "ud", "┌": "rd", "┐": "ld", "└": "ru", "┘": "lu", "├": "rud", "┤": "lud", "┬": "lrd", "┴": "lru",
         "┼": "lrud", "╭": "rd", "╮": "ld", "╰": "ru", "╯": "lu", "━": "lr", "┃": "ud", "╴": "l", "╶": "r", "╵": "u",
         "╷": "d", "═": "lr", "║": "ud"}  # fmt: skip
# The part of a cell that a block fills: left, top, right, bottom.
BLOCKS = {"█": (0, 0, 1, 1), "▀": (0, 0, 1, 0.5), "▄": (0, 0.5, 1, 1), "▌": (0, 0, 0.5, 1), "▐": (0.5, 0, 1, 1),
          **{sign: (0, 0, (8 - at) / 8, 1) for at, sign in enumerate("█▉▊▋▌▍▎▏")},
          **{sign: (0, 1 - (at + 1) / 8, 1, 1) for at, sign in enumerate("▁▂▃▄▅▆▇█")}}  # fmt: skip
# The dots of a Braille sign by its bits: column and row.
DOTS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]


def color(name, default):
    if name == "default":
        return default
    return COLORS.get(name) or f"#{name}"


def shapes(x, y, sign, fill):
    """The shapes of a sign that is not a letter; None for a letter."""
    middle_x, middle_y = x + WIDTH / 2, y + HEIGHT / 2
    if sides := BOXES.get(sign):
        ends = {"l": (x, middle_y), "r": (x + WIDTH, middle_y), "u": (middle_x, y), "d": (middle_x, y + HEIGHT)}
        path = "".join(f"M{middle_x:g} {middle_y:g}L{ends[side][0]:g} {ends[side][1]:g}" for side in sides)
        return f'<path d="{path}" stroke="{fill}" stroke-linecap="square"/>'
    if block := BLOCKS.get(sign):
        left, top, right, bottom = block
        return (
            f'<rect x="{x + left * WIDTH:g}" y="{y + top * HEIGHT:g}" width="{(right - left) * WIDTH + 0.2:g}" '
            f'height="{(bottom - top) * HEIGHT + 0.2:g}" fill="{fill}"/>'
        )
    if 0x2800 < ord(sign) <= 0x28FF:
        bits = ord(sign) - 0x2800
        dots = [DOTS[bit] for bit in range(8) if bits >> bit & 1]
        return "".join(
            f'<circle cx="{x + (column + 0.5) * WIDTH / 2:g}" cy="{y + (row + 0.5) * HEIGHT / 4:g}" r="1.6" fill="{fill}"/>'
            for column, row in dots
        )
    return None


def draw(screen, title):
    width, height = COLUMNS * WIDTH + 2 * PAD, LINES * HEIGHT + 2 * PAD + BAR
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="DejaVu Sans Mono, Menlo, '
        f'Consolas, monospace" font-size="14.5">',
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="{BACKGROUND}"/>',
        *(
            f'<circle cx="{20 + 20 * at}" cy="{BAR / 2 + 4:g}" r="6" fill="{c}"/>'
            for at, c in enumerate(["#e06c75", "#e5c07b", "#98c379"])
        ),
        f'<text x="{width / 2:g}" y="{BAR / 2 + 9:g}" text-anchor="middle" fill="#7f848e">{html.escape(title)}</text>',
    ]
    for row in range(LINES):
        y = PAD + BAR + row * HEIGHT
        run = None  # letters in a line with one look: start, text, look

        def flush():
            if run and run[1].strip():
                start, text, (fill, bold) = run
                x, length = PAD + start * WIDTH, len(text) * WIDTH
                weight = ' font-weight="bold"' if bold else ""
                parts.append(
                    f'<text x="{x:g}" y="{y + HEIGHT * 0.76:g}" fill="{fill}"{weight} textLength="{length:g}" '
                    f'lengthAdjust="spacingAndGlyphs" xml:space="preserve">{html.escape(text)}</text>'
                )

        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            x = PAD + column * WIDTH
            fill, ground = color(cell.fg, FOREGROUND), color(cell.bg, BACKGROUND)
            if cell.reverse:
                fill, ground = ground, fill
            if ground != BACKGROUND:
                parts.append(
                    f'<rect x="{x:g}" y="{y:g}" width="{WIDTH + 0.2:g}" height="{HEIGHT + 0.2:g}" fill="{ground}"/>'
                )
            sign = cell.data or " "
            shape = shapes(x, y, sign, fill) if len(sign) == 1 else None
            look = (fill, cell.bold)
            if shape is not None or sign == " ":
                flush()
                run = None
                parts.extend([shape] if shape else [])
            elif run and run[2] == look:
                run = (run[0], run[1] + sign, look)
            else:
                flush()
                run = (column, sign, look)
        flush()
    return "\n".join([*parts, "</svg>", ""])


def capture(program, steps, keys):
    """The screen when that many steps are over, or the run is."""
    folder = tempfile.mkdtemp()
    arguments = ["train", "configs/quickstart.toml", "--set", f"run.dir={folder}"]
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = dict(os.environ, TERM="xterm-256color", COLORTERM="truecolor")
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [program, *arguments], cwd=ROOT, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True
    )
    os.close(side)
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)

    def feed(data):
        # pyte has no second screen: the dashboard's begins empty.
        stream.feed(data.replace(b"\x1b[?1049h", b"\x1b[?1049h\x1b[2J\x1b[H"))

    metrics = pathlib.Path(folder, "quickstart", "metrics.jsonl")
    drawn = None
    while process.poll() is None:
        if select.select([main], [], [], 0.2)[0]:
            try:
                feed(os.read(main, 1 << 16))
            except OSError:
                break
        taken = metrics.read_text().count('"train"') if metrics.exists() else 0
        if taken >= steps:
            for key in keys:
                os.write(main, {"L": b"\x1b[C", "H": b"\x1b[D", "J": b"\x1b[B", "K": b"\x1b[A"}[key])
                time.sleep(0.3)
            until = time.monotonic() + 3
            while time.monotonic() < until:
                if select.select([main], [], [], 0.2)[0]:
                    feed(os.read(main, 1 << 16))
            drawn = draw(screen, "moonlight train configs/quickstart.toml")
            break
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
    if drawn is None:
        raise SystemExit("the run ended before its dashboard could be drawn")
    return drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--keys", default="", help="arrow keys before the capture: H, J, K, L for left, down, up, right"
    )
    arguments = parser.parse_args()
    arguments.output.write_text(capture(arguments.program.resolve(), arguments.steps, arguments.keys))


if __name__ == "__main__":
    main()
