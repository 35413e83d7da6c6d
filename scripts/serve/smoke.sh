#!/usr/bin/env bash
# A short test of `moonlight serve` with a tiny model: OpenAI's client, some load, clients that misbehave, and SIGTERM while requests run.
#
#     scripts/serve/smoke.sh PROGRAM [MODEL]
#
# PROGRAM is the built `moonlight`. MODEL is a tiny model of scripts/serve/tiny_model.py; without it one is trained. Needs Python 3.11;
# with the package `openai` its client is checked, too. Takes 2 minutes.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
program="$(realpath "$1")"
python="${PYTHON:-python3}"
home="$(mktemp -d)"
trap 'rm -rf "$home"' EXIT
model="${2:-$home/tiny}"
"$python" "$here/tiny_model.py" "$model" --moonlight "$program"
if "$python" -c 'import openai' 2> "$home/import"; then
    "$python" "$here/check_openai.py" --moonlight "$program" --model "$model"
else
    echo "SKIPPED serve: the package \`openai\` is not installed"
    if [ -n "${MOONLIGHT_SKIPPED:-}" ]; then
        echo "scripts/serve/check_openai.py: the package \`openai\` is not installed" >> "$MOONLIGHT_SKIPPED"
    fi
fi
"$python" "$here/check_shutdown.py" --moonlight "$program" --model "$model"
"$python" "$here/load_test.py" --moonlight "$program" --model "$model" --clients 1 8 --least 8 --per-client 2 \
    --requests 400 --short --output "$home/load"
