"""Files out of packages: the right one, once, by hash; every failure in one line."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from bigmodel_jax.data import packages
from bigmodel_jax.errors import InputError

CONTENT = b"label\ttext\n1\tgood\n"
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A registry of two packages; counts downloads."""
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path / "cache"))
    calls = []

    def download(command, **_):
        requirement, dest = command[-1], command[command.index("--dest") + 1]
        calls.append(requirement)
        if requirement == "gone==1":
            return type("Done", (), {"returncode": 1, "stderr": "noise\nERROR: no network\n"})
        if requirement == "wheel==1.0":
            with zipfile.ZipFile(f"{dest}/wheel-1.0.whl", "w") as box:
                box.writestr("pkg/data/train.tsv", CONTENT)
                box.writestr("pkg/config.json", b"{}")
        else:
            with tarfile.open(f"{dest}/source-2.tar.gz", "w:gz") as box:
                entry = tarfile.TarInfo("source-2/pkg/train.tsv")
                entry.size = len(CONTENT)
                box.addfile(entry, io.BytesIO(CONTENT))
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(packages.subprocess, "run", download)
    return calls


def test_a_member_comes_once_and_from_any_archive(shelf):
    path = packages.fetch("wheel==1.0", "pkg/data/train.tsv", SHA)
    assert path.read_bytes() == CONTENT
    other = packages.fetch("wheel==1.0", "pkg/config.json", hashlib.sha256(b"{}").hexdigest())
    assert other.parent == path.parent.parent == packages.folder("wheel==1.0") / "pkg"
    assert packages.fetch("wheel==1.0", "pkg/data/train.tsv", SHA) == path and shelf == ["wheel==1.0"]
    assert packages.fetch("source==2", "pkg/train.tsv", SHA).read_bytes() == CONTENT
    path.write_bytes(b"changed")  # a damaged copy is replaced, not believed
    assert packages.fetch("wheel==1.0", "pkg/data/train.tsv", SHA).read_bytes() == CONTENT


def test_every_failure_is_one_line(shelf):
    with pytest.raises(InputError, match="expected " + "0" * 64):
        packages.fetch("wheel==1.0", "pkg/config.json", "0" * 64)
    assert not (packages.folder("wheel==1.0") / "pkg" / "config.json").exists()
    with pytest.raises(InputError, match="no member 'pkg/data/trains.tsv'; did you mean 'pkg/data/train.tsv'"):
        packages.fetch("wheel==1.0", "pkg/data/trains.tsv", SHA)
    with pytest.raises(InputError, match="cannot download gone==1.*ERROR: no network"):
        packages.fetch("gone==1", "x", SHA)
    with pytest.raises(InputError, match="outside"):
        packages.fetch("wheel==1.0", "../../x", SHA)
    with pytest.raises(InputError, match="pinned"):
        packages.fetch("wheel>=1.0", "x", SHA)


def test_a_folder_comes_whole(shelf):
    digest = hashlib.sha256(
        "".join(
            f"{name} {hashlib.sha256(content).hexdigest()}\n"
            for name, content in (("config.json", b"{}"), ("data/train.tsv", CONTENT))
        ).encode()
    ).hexdigest()
    spec = f"package:wheel==1.0:pkg/:{digest}"
    place = packages.fetch_folder("wheel==1.0", "pkg/", digest)
    assert packages.locate(spec) == str(place) and packages.locate("a/b.csv") == "a/b.csv"
    assert (place / "data" / "train.tsv").read_bytes() == CONTENT and shelf == ["wheel==1.0"]
    (place / "config.json").write_bytes(b"[]")
    assert packages.locate(spec) == str(place) and (place / "config.json").read_bytes() == b"{}"
    with pytest.raises(InputError, match="expected " + "0" * 64):
        packages.fetch_folder("wheel==1.0", "pkg", "0" * 64)
    with pytest.raises(InputError, match="no folder 'pkgs'; did you mean 'pkg'"):
        packages.fetch_folder("wheel==1.0", "pkgs", digest)
    with pytest.raises(InputError, match="package:NAME==VERSION:MEMBER:SHA256"):
        packages.locate("package:wheel==1.0")
