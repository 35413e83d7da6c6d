#!/usr/bin/env bash
# Installs the wheel into a fresh environment as a user would, and runs both programs from there: no Rust on the PATH, no network, no other package.
# Prints the time from nothing to the first token.
#
#     scripts/install/check_wheel.sh [WHEEL | FOLDER] [MODEL]
#
# FOLDER has the two programs, which are packed into a wheel first: by default those that the tests have built. MODEL is a checkpoint to generate a
# token with, by default a fixture. A wheel for other Linux machines (`manylinux_...`) must not ask for a newer glibc than its name says.
#
# Needs Python 3.8 or newer with venv; to pack, maturin and wheel, which it installs from PyPI into an environment of its own. Takes a minute.
set -euo pipefail
cd "$(dirname "$0")/../.."

given="${1:-${CARGO_TARGET_DIR:-target}/debug}"
model="${2:-fixtures/moonlight-like}"
home="$(mktemp -d)"
trap 'rm -rf "$home"' EXIT
case "$(uname -s)" in
    MINGW* | MSYS*) bin=Scripts ending=.exe ;;
    *) bin=bin ending= ;;
esac
python="$(command -v python3 || command -v python)"

fail() {
    echo "wheel: $1" >&2
    exit 1
}

if [ -d "$given" ]; then
    # Kept, because two installations from PyPI in each run of the checks would be two chances to fail.
    tools="${CARGO_TARGET_DIR:-target}/wheel-tools"
    if ! "$tools/$bin/python" -c 'import wheel' 2> /dev/null || ! [ -x "$tools/$bin/maturin$ending" ]; then
        "$python" -m venv "$tools"
        if ! "$tools/$bin/python" -m pip install --quiet --disable-pip-version-check maturin==1.16.0 wheel==0.48.0; then
            echo "SKIPPED: the wheel: maturin cannot be installed"
            exit 0
        fi
    fi
    tools="$(cd "$tools/$bin" && pwd)"
    given="$(PATH="$tools:$PATH" "$tools/python" scripts/install/pack_wheel.py "$given" "$home/wheels")"
fi
[ -f "$given" ] || fail "there is no \`$given\`"
name="$(basename "$given")"

# What a user does, with nothing that could come from this machine's Rust.
milliseconds() { "$python" -c 'import time; print(round(time.time() * 1000))'; }
clean() { env -i HOME="$home" PATH="$home/venv/$bin" SYSTEMROOT="${SYSTEMROOT:-}" TEMP="${TEMP:-/tmp}" "$@"; }
start="$(milliseconds)"
"$python" -m venv "$home/venv"
made="$(milliseconds)"
# Without an index: the wheel has no dependencies.
clean python -m pip install --quiet --disable-pip-version-check --no-index "$given"
installed="$(milliseconds)"
answer="$(clean moonlight generate --model "$model" --prompt-tokens 79,5,81 --max-new-tokens 1 --temperature 0 --json)"
end="$(milliseconds)"

"$python" -c 'import json, sys; assert len(json.loads(sys.argv[1])["tokens"]) == 1, sys.argv[1]' "$answer"
version="$(echo "$name" | cut -d- -f2)"
for program in moonlight moonlight-convert; do
    [ "$(clean "$program" --version)" = "$program $version" ] || fail "\`$program --version\` does not print $version"
    clean "$program" --help > /dev/null
done
clean moonlight-convert inspect "$model" > /dev/null
clean moonlight completions bash | grep -q _moonlight || fail "no completions"
files="$(clean python -m pip show --files moonlight-burn)"
for license in LICENSE-MIT LICENSE-APACHE; do
    echo "$files" | grep -q "licenses.$license" || fail "the wheel has no $license"
done

# `manylinux_2_17_x86_64` runs on systems with glibc 2.17 or newer.
allowed="$(echo "$name" | grep -o 'manylinux_[0-9]*_[0-9]*' | head -1 | sed 's/manylinux_//; s/_/./' || true)"
if [ -n "$allowed" ]; then
    for program in moonlight moonlight-convert; do
        needed="$(objdump -T "$home/venv/bin/$program" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1 | sed 's/GLIBC_//')"
        [ "$(printf '%s\n' "$needed" "$allowed" | sort -V | tail -1)" = "$allowed" ] || fail "\`$program\` needs glibc $needed, and its wheel promises $allowed"
        echo "wheel: \`$program\` needs glibc $needed"
    done
fi

clean python -m pip uninstall --quiet --yes moonlight-burn
[ ! -e "$home/venv/$bin/moonlight$ending" ] || fail "uninstalling leaves \`moonlight\`"
size="$("$python" -c 'import os, sys; print(f"{os.path.getsize(sys.argv[1]) / 1e6:.1f} MB")' "$given")"
echo "wheel: $name ($size): environment $((made - start)) ms, pip install $((installed - made)) ms, first token $((end - installed)) ms"
