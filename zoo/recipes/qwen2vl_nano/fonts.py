"""The fonts that pictures are printed in: openly licensed, fetched from PyPI packages, split by family.

`python -m qwen2vl_nano.fonts` downloads the packages below (nothing of theirs is run) and unpacks the font
files into FONTS_DIR/train and FONTS_DIR/heldout. No held-out family is ever seen in training.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
FONTS_DIR = Path(os.environ.get("ZOO_FONTS", REPOSITORY / ".cache" / "zoo-fonts"))

HELDOUT = (
    "font-manrope==0.0.2", "font-caladea==0.0.2", "font-lato==0.1.0", "fontpkg-zilla-slab==1.2",
    "fontpkg-varela-round==3.10",
)  # fmt: skip
TRAIN = (
    "matplotlib==3.11.2", "font-source-sans-pro==0.0.1", "font-source-serif-pro==0.0.1", "font-rhd==0.1.3",
    "font-fjallaone==0.1.7", "font-fredoka-one==0.0.4", "fontpkg-fira-sans==4.203", "fontpkg-ibm-plex-mono==2.3",
    "fontpkg-ibm-plex-serif==2.6", "fontpkg-arvo==1.6", "fontpkg-poppins==4.4", "fontpkg-pt-serif==1.0",
    "fontpkg-pt-sans-narrow==2.3", "fontpkg-alfa-slab-one==2.0", "fontpkg-spectral==2.5",
    "fontpkg-crimson-text==1.100", "fontpkg-barlow-condensed==1.408", "fontpkg-titillium-web==1.2",
    "fontpkg-play==2.101", "fontpkg-cardo==1.45", "fontpkg-abeezee==1.3", "fontpkg-anton==2.116",
    "fontpkg-kalam==2.1", "fontpkg-delius==1.1", "fontpkg-space-mono==1.3", "fontpkg-acme==1.2",
    "fontpkg-sanchez==1.1", "fontpkg-archivo-black==1.6", "fontpkg-mukta==2.538",
)  # fmt: skip
WANTED = re.compile(
    r"(?<!LastResortHE)[-_](Regular|Bold|Italic|It|SemiBold|Semibold|Medium|BoldOblique|BoldItalic|Web-Regular|Web-Bold|Web-Italic)\.ttf$"
    r"|DejaVu(Sans|SansMono|Serif)\.ttf$|STIXGeneral(Bol|Italic)?\.ttf$|/cm(r10|ss10|tt10|b10)\.ttf$"
)


def fetch(packages: tuple[str, ...], into: Path) -> int:
    """Download each package's wheel and copy the font files that we use; returns how many there are."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, *packages], check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if WANTED.search(name):
                        (into / Path(name).name).write_bytes(archive.read(name))
    return len(list(into.glob("*.ttf")))


@cache
def font_files(split: str) -> tuple[str, ...]:
    """Paths of the fonts of a split, 'train' or 'heldout'."""
    files = sorted(str(path) for path in (FONTS_DIR / split).glob("*.ttf"))
    if not files:
        raise FileNotFoundError(f"no fonts in {FONTS_DIR / split}: run `python -m qwen2vl_nano.fonts` first")
    return tuple(files)


if __name__ == "__main__":
    print("train fonts:", fetch(TRAIN, FONTS_DIR / "train"))
    print("held-out fonts:", fetch(HELDOUT, FONTS_DIR / "heldout"))
