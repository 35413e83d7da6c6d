#!/usr/bin/env bash
# Fails if a tag is not the version of the workspace, or the changelog has no section about it.
#
#     scripts/install/check_version.sh v0.1.0
#
# Needs nothing. Takes no time.
set -euo pipefail
cd "$(dirname "$0")/../.."

version="$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"$/\1/p' Cargo.toml)"
[ "$1" = "v$version" ] || { echo "the tag is $1, and the version in Cargo.toml $version" >&2; exit 1; }
grep -q "^## \[\{0,1\}$version" CHANGELOG.md || { echo "CHANGELOG.md has no section \`## $version\`" >&2; exit 1; }
echo "version $version"
