#!/usr/bin/env bash
# The first hour on a machine with a GPU, in one command: finds a Python, or makes an environment from a folder of wheels, and runs
# `gpu_day.py`, whose `--help` says what is measured.
#
#     scripts/bench/gpu_day.sh PROGRAMS [--wheels FOLDER] [OPTIONS OF gpu_day.py]
#
# FOLDER contains the wheels of torch and transformers with all that they need, for the machine's Python; on a machine with a network:
#
#     pip download --dest FOLDER torch transformers
#
# The environment is made once, in `FOLDER/venv`. `PYTHON` is the Python to use [default: python3]. Needs: Python 3.11. Takes: ten
# minutes, and some for the wheels.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

wheels=""
options=()
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels)
            wheels="${2:?--wheels needs a folder}"
            shift 2
            ;;
        --wheels=*)
            wheels="${1#--wheels=}"
            shift
            ;;
        *)
            options+=("$1")
            shift
            ;;
    esac
done

python=""
for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        python="$name"
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: there is no Python 3.11 or newer" >&2
    echo "hint: set PYTHON to one" >&2
    exit 2
fi

if [ -n "$wheels" ]; then
    if [ ! -d "$wheels" ]; then
        echo "error: \`$wheels\` is not a folder" >&2
        exit 2
    fi
    environment="$wheels/venv"
    if [ ! -e "$environment/complete" ]; then
        rm -rf "$environment"
        "$python" -m venv --system-site-packages "$environment"
        # What is not in the folder is left out, and the comparisons that need it with it.
        for package in torch transformers; do
            "$environment/bin/python" -m pip install --quiet --no-index --find-links "$wheels" "$package" ||
                echo "warning: \`$package\` cannot be installed from \`$wheels\`" >&2
        done
        touch "$environment/complete"
    fi
    python="$environment/bin/python"
fi

exec "$python" "$here/gpu_day.py" ${options[@]+"${options[@]}"}
