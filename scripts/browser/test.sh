#!/usr/bin/env bash
# Tests the page of `moonlight serve` in headless Chromium. With a program, also against its server and a running training:
#
#     scripts/browser/test.sh [PROGRAM]
#
# Needs Chromium (or its path in CHROMIUM), node 20 or later and npm; without one of them it prints SKIPPED and why, and ends
# with 0. PICTURES=DIR keeps pictures of the page. Takes two minutes.
set -euo pipefail

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
    exit
    ;;
esac

skip() {
  echo "SKIPPED: $1"
  exit 0
}

program=${1:-}
if [[ -n $program ]]; then
  [[ -x $program ]] || { echo "error: \`$program\` is no program" >&2; exit 1; }
  PROGRAM=$(realpath "$program")
  export PROGRAM
fi
[[ -z ${PICTURES:-} ]] || PICTURES=$(realpath -m "$PICTURES")

if [[ -z ${CHROMIUM:-} ]]; then
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    CHROMIUM=$(command -v "$name") && break
  done
fi
[[ -n ${CHROMIUM:-} ]] || skip "there is no Chromium; give its path as CHROMIUM"
export CHROMIUM PICTURES
command -v node > /dev/null || skip "there is no node"
node -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 20 ? 0 : 1)' || skip "node is older than 20"

cd "$(dirname "$0")"
if [[ ! -d node_modules/playwright-core || ! -d node_modules/axe-core ]]; then
  command -v npm > /dev/null || skip "there is no npm"
  npm ci --no-audit --no-fund --silent || skip "npm cannot install playwright-core and axe-core"
fi
exec node --test --test-reporter=spec page.test.mjs program.test.mjs
