#!/usr/bin/env python3
"""Makes the archive of a release from a wheel: the programs, completions for shells, licenses and the README, and a file with its SHA-256.

    python3 scripts/install/make_archive.py wheels/moonlight_burn-0.1.0-py3-none-manylinux_2_17_x86_64.whl linux-x86_64 archives

The programs are the wheel's own, so that both are built once and are the same. They must run on this machine, because they print the completions.
Writes `moonlight-VERSION-NAME.tar.gz`, for Windows `.zip`; the same wheel gives the same bytes.

Needs: only Python. Takes: seconds.
"""

import argparse
import gzip
import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

COMPLETIONS = {
    "bash": "moonlight.bash",
    "zsh": "_moonlight",
    "fish": "moonlight.fish",
    "powershell": "moonlight.ps1",
}
LICENSES = ["LICENSE-MIT", "LICENSE-APACHE", "THIRD-PARTY-LICENSES.txt"]
# Of every file, so that an archive depends on its contents alone; zip knows no earlier year.
DATE = (1980, 1, 1, 0, 0, 0)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("name", help="of the platform")
    parser.add_argument("output", type=pathlib.Path, help="the folder for the archive")
    parser.add_argument(
        "--licenses",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse a wheel without the licenses of its dependencies (cargo xtask notices)",
    )
    options = parser.parse_args()
    programs, files = read(options.wheel, options.licenses)
    files |= completions(programs)
    files["README.md"] = (common.ROOT / "README.md").read_bytes()
    version = options.wheel.name.split("-")[1]
    folder = f"moonlight-{version}-{options.name}"
    options.output.mkdir(parents=True, exist_ok=True)
    windows = any(name.endswith(".exe") for name in programs)
    archive = options.output / f"{folder}{'.zip' if windows else '.tar.gz'}"
    (write_zip if windows else write_tar)(archive, folder, programs, files)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    # In the form of `sha256sum`, which also checks it.
    archive.with_name(f"{archive.name}.sha256").write_text(f"{digest}  {archive.name}\n")
    print(f"{archive}: {len(programs) + len(files)} files, {archive.stat().st_size / 1e6:.1f} MB, sha256 {digest}")


def read(wheel, all_licenses):
    """The programs of a wheel, and its licenses."""
    programs, licenses = {}, {}
    with zipfile.ZipFile(wheel) as archive:
        for path in map(pathlib.PurePosixPath, archive.namelist()):
            if path.parent.name == "scripts":
                programs[path.name] = archive.read(str(path))
            elif path.parent.name == "licenses":
                licenses[path.name] = archive.read(str(path))
    if len(programs) != 2:
        sys.exit(f"error: `{wheel}` contains {len(programs)} programs")
    if all_licenses and (missing := set(LICENSES) - licenses.keys()):
        sys.exit(
            f"error: `{wheel}` does not contain {', '.join(sorted(missing))}\nhint: run `cargo xtask notices` before the build"
        )
    return programs, licenses


def completions(programs):
    with tempfile.TemporaryDirectory() as home:
        (name,) = (name for name in programs if pathlib.PurePath(name).stem == "moonlight")
        program = pathlib.Path(home) / name
        program.write_bytes(programs[name])
        program.chmod(0o755)
        return {
            f"completions/{file}": subprocess.run(
                [program, "completions", shell], check=True, stdout=subprocess.PIPE
            ).stdout
            for shell, file in COMPLETIONS.items()
        }


def write_tar(path, folder, programs, files):
    # The name of the file and the time would be in the header of gzip.
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, 0) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in sorted((programs | files).items()):
                entry = tarfile.TarInfo(f"{folder}/{name}")
                entry.size, entry.mode = len(data), 0o755 if name in programs else 0o644
                archive.addfile(entry, io.BytesIO(data))


def write_zip(path, folder, programs, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted((programs | files).items()):
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}", DATE), data, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
