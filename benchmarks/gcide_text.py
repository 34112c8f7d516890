"""Webster's dictionary (GCIDE, 40 MB) as a corpus: Debian's package dict-gcide, one document for each entry.

    python benchmarks/gcide_text.py runs/gcide.jsonl
    bigmodel train --config configs/lm_tiny.py --workdir runs/dictionary --config.data.corpus=jsonl:runs/gcide.jsonl

Fetched by `apt-get download`, which needs no root; elsewhere give the .deb itself as a second argument. The text is
pinned by its sha256: bytes that are no UTF-8 (a few dozen) are replaced, entries are split where a line after an empty
one is not indented.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

from bigmodel_jax.errors import InputError

PACKAGE = "dict-gcide=0.48.5+nmu2"
MEMBER = "./usr/share/dictd/gcide.dict.dz"
SHA256 = "802beb667e1fb666203e750f1faea60d5c202ac5430c2083c4180494609f10a7"


def download(folder: str) -> Path:
    """The package's archive. Errors: InputError where apt-get is not there or does not know it."""
    try:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise InputError(
            f"apt-get download {PACKAGE}: {said.strip().splitlines()[-1]}; fetch it elsewhere and name the file"
        ) from None
    return next(Path(folder).glob("*.deb"))


def text(deb: Path) -> str:
    """The dictionary out of the archive. Errors: InputError for another text than the pinned one."""
    try:
        packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], check=True, capture_output=True).stdout
        member = subprocess.run(["tar", "-xO", MEMBER], input=packed, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"{deb} is no package with {MEMBER}, or there is no dpkg-deb: {error}") from None
    raw = gzip.decompress(member)
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:
        raise InputError(f"{MEMBER} of {deb} has sha256 {found}, expected {SHA256}")
    return raw.decode("utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("deb", type=Path, nargs="?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        entries = re.split(r"\n\n(?=\S)", text(args.deb or download(folder)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps({"text": entry + "\n"}) + "\n" for entry in entries))
    print(f"{args.out}: {len(entries):,} entries, {sum(map(len, entries)):,} characters")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"gcide_text: {error}") from None
