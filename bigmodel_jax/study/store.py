"""The cells of a study on disk: which exist, who runs them, what came out.

A cell is one run, named by the hash of what determines its result: the resolved config with its seed, without its
mechanics (mesh, runtime, logging, checkpoints, microbatch). Not part of the name, and written down instead: the commit
of the package, and the fingerprints of the examples that were trained and evaluated on, by which rows are
compared (spec.check_comparable). An option that the package has gained since keeps a finished cell valid as long as
the study does not set it.

    <workdir>/groups/         cells that are trained as lanes of one program: their list, log and common checkpoints
    <workdir>/cells/<cell>/   cell.json, then the run's own directory: result.json, metrics.jsonl, checkpoints ...
                              attempts.jsonl, a line at every start and end of a run; log.txt; row.json at last
    results/studies/<study>.jsonl   one finished row a line, for other machines (--record). Those of runs that others
                              start from say what they cost: without their checkpoints they are made again

Who runs a cell holds a file lock that the run inherits: it is gone when both are, also after a kill or a power
cut, and holds on while an orphaned run still computes.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel_jax import experiment, metrics, schema
from bigmodel_jax.errors import InputError
from bigmodel_jax.lanes import MAY_DIFFER
from bigmodel_jax.study import journal, rows
from bigmodel_jax.study.spec import FIRST, Row, Study
from bigmodel_jax.workdir import DIVERGED

FINAL = ("done", "diverged")


@dataclass(frozen=True)
class Cell:
    """One run to be made. extra: overrides by leaf beyond the variant's. given: every leaf that the study sets.

    start: the id of the cell that it starts from, "" for none. Its config then has "first:ID" as init_from.path, so
    that its own id depends on all that the other's does.
    """

    id: str
    variant: str
    seed: int
    extra: dict[str, Any]
    purpose: str
    config: dict[str, Any]
    given: frozenset[str]
    start: str = ""

    def arguments(self, file: str, cells: str) -> list[str]:
        """Of `bigmodel train`, all but --workdir. cells: the folder of all runs."""
        leaves = {**self.extra, "seed": self.seed}
        if self.start:
            leaves["init_from.path"] = f"{cells}/{self.start}"
        return ["--config", f"{file}:{self.variant}", *(f"--config.{leaf}={value!r}" for leaf, value in leaves.items())]


@dataclass(frozen=True)
class Job:
    """A process to start. folder: for its log, and for what the launch policy remembers."""

    cells: tuple[Cell, ...]
    folder: Path
    command: list[str]


class Claim:
    """The right to run a cell, held by this process and by the run that inherits `descriptor`."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def release(self) -> None:
        os.close(self.descriptor)


def _essential(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in experiment.MECHANICS}


def repository(file: str) -> Path:
    """The folder above `configs`, or the study file's own folder."""
    folder = Path(file).resolve().parent
    return next((p.parent for p in (folder, *folder.parents) if p.name == "configs"), folder)


class Store:
    """Cells and rows of one study.

    Args:
      workdir: shared by everyone who works on the study.
      record: also take finished rows from results/studies/<study>.jsonl, and append new ones.
    """

    def __init__(self, study: Study, workdir: str | os.PathLike, *, record: bool = False):
        self.study = study
        self.workdir = Path(os.path.abspath(workdir))
        root = repository(study.file)
        source = Path(study.file).resolve()
        self.file = str(source.relative_to(root))
        self.recorded = root / "results" / "studies" / f"{study.name}.jsonl" if record else None
        self._rows: dict[str, Row] = {}
        self._seen: tuple[Any, list[dict[str, Any]]] = (None, [])

    # --- cells

    def cell(self, variant: str, seed: int, extra: Mapping[str, Any] | None = None, purpose: str = "seeds") -> Cell:
        """The cell of a variant with these further overrides."""
        extra = dict(extra or {})
        raw = self.study.config(variant, **extra, seed=seed)
        config = experiment.resolve(raw)
        path, start = config["init_from"]["path"], ""
        if path.startswith(FIRST):
            start = self.cell(path, seed, self._fold(extra), "first").id
            config["init_from"]["path"] = FIRST + start
        given = frozenset(schema.flat(raw))
        return Cell(experiment.config_hash(config), variant, seed, extra, purpose, config, given, start)

    def starts(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells that these start from, each once."""
        found = {}
        for cell in cells:
            if cell.start:
                path = self.study.config(cell.variant)["init_from"]["path"]
                found[cell.start] = self.cell(path, cell.seed, self._fold(cell.extra), "first")
        return list(found.values())

    def cells(self, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
        """The cells that the report is made of, seed by seed: a study cut short still has every variant.

        Args:
          chosen: {variant: tuned overrides}.
        """
        return [
            self.cell(variant, seed, {**(chosen or {}).get(variant, {}), **fold})
            for seed, fold in self.study.repeats for variant in self.study.variants
        ]  # fmt: skip

    def _fold(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        return {leaf: extra[leaf] for leaf in self.study.folds}

    def folder(self, cell: Cell) -> Path:
        return self.workdir / "cells" / cell.id

    def keep(self, name: str, value: Any) -> None:
        """Write a JSON file beside the cells."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        journal.write(self.workdir / name, metrics.encode(value))

    def forgotten(self, cells: Sequence[Cell]) -> list[str]:
        """Cells on disk that the study no longer has, by id."""
        known = {cell.id for cell in cells}
        return sorted(p.name for p in (self.workdir / "cells").glob("*") if p.name not in known)

    # --- who runs it

    def claim(self, cell: Cell) -> Claim | None:
        """The right to run a cell, or None while somebody else has it."""
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".claim", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            raise InputError(f"'{self.workdir}' has no file locks: {error.strerror}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{platform.node()} {os.getpid()}\n".encode(), 0)
        if not (folder / "cell.json").exists():
            journal.write(folder / "cell.json", {
                "cell": cell.id, "study": self.study.name, "variant": cell.variant, "seed": cell.seed,
                "overrides": self.overrides(cell), "purpose": cell.purpose, "config": cell.config,
                "command": self.command(cell),
            })  # fmt: skip
        return Claim(descriptor)

    def owner(self, cell: Cell) -> str:
        """Who runs a cell, as "host pid"; "" for nobody."""
        path = self.folder(cell) / ".claim"
        if not path.exists():
            return ""
        with open(path, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "somebody"
        return ""

    def overrides(self, cell: Cell) -> dict[str, Any]:
        return {**self.study.changes(cell.variant), **cell.extra}

    def command(self, cell: Cell) -> str:
        """What a person types to run the cell again, from the repository."""
        runs = f"runs/{self.study.name}"
        return shlex.join(["bigmodel", "train", *cell.arguments(self.file, runs), "--workdir", f"{runs}/{cell.id}"])

    # --- jobs

    def job(self, cells: Sequence[Cell], python: Sequence[str]) -> Job:
        """One process that trains these cells: alone, or as lanes of one program (train_lanes.py).

        Args:
          python: the beginning of the command, up to `train`.
        """
        file = str(Path(self.study.file).resolve())
        if len(cells) == 1:
            folder = self.folder(cells[0])
            arguments = cells[0].arguments(file, str(folder.parent))
            return Job(tuple(cells), folder, [*python, *arguments, "--workdir", str(folder)])
        ids = [cell.id for cell in cells]
        folder = self.workdir / "groups" / hashlib.sha256(" ".join(ids).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        leaves = [{leaf: schema.flat(cell.config)[leaf] for leaf in MAY_DIFFER} for cell in cells]
        journal.write(folder / "given.json", [
            {"workdir": str(self.folder(cell)), "overrides": own} for cell, own in zip(cells, leaves, strict=True)
        ])  # fmt: skip
        journal.write(folder / "cells.json", ids)
        command = [*python, "--config", f"{file}:{cells[0].variant}"]
        extra = [f"--config.{leaf}={value!r}" for leaf, value in cells[0].extra.items() if leaf not in MAY_DIFFER]
        return Job(
            tuple(cells), folder, [*command, *extra, "--lanes", str(folder / "given.json"), "--workdir", str(folder)]
        )

    def groups(self, waiting: Sequence[Cell], size: int) -> list[list[Cell]]:
        """Cells to be trained together, at most `size` of them; those begun together stay so, the rest goes alone."""
        left = {cell.id: cell for cell in waiting}
        out = []
        for path in sorted((self.workdir / "groups").glob("*/cells.json")):
            ids = journal.read(path) or []
            if ids and all(each in left for each in ids):
                out.append([left.pop(each) for each in ids])
        alike: dict[str, list[Cell]] = {}
        for cell in left.values():
            begun = (self.folder(cell) / "checkpoints").exists()
            stops = cell.config["eval"]["metric"] or cell.config["eval"]["patience"]
            fits = size > 1 and not begun and not cell.start and not stops
            shared = {k: v for k, v in schema.flat(_essential(cell.config)).items() if k not in MAY_DIFFER}
            alike.setdefault(json.dumps(shared, default=str) if fits else cell.id, []).append(cell)
        for cells in alike.values():
            out += [cells[n : n + max(size, 1)] for n in range(0, len(cells), max(size, 1))]
        order = {cell.id: n for n, cell in enumerate(waiting)}
        return sorted(out, key=lambda cells: min(order[cell.id] for cell in cells))

    # --- attempts

    def begin(self, cell: Cell) -> None:
        """Write that a run starts; an earlier one that nobody saw end is closed first."""
        self._close_open_attempt(cell)
        journal.append(self.folder(cell) / "attempts.jsonl", {"start": time.time(), "host": platform.node()})

    def end(self, cell: Cell, code: int, wall_s: float, cpu_s: float, *, failed: bool = False) -> None:
        """Write that a run ended; `failed`: it will not be tried again by itself."""
        line = {"end": time.time(), "code": code, "wall_s": round(wall_s, 3), "cpu_s": round(cpu_s, 3)}
        journal.append(self.folder(cell) / "attempts.jsonl", line | ({"failed": True} if failed else {}))

    def attempts(self, cell: Cell) -> list[dict[str, Any]]:
        """Starts and ends in order."""
        return list(journal.lines(self.folder(cell) / "attempts.jsonl"))

    def _close_open_attempt(self, cell: Cell) -> None:
        """After a kill: the run lasted until its last sign of life, and its CPU time is not known."""
        lines = self.attempts(cell)
        if not lines or "start" not in lines[-1]:
            return
        folder = self.folder(cell)
        signs = [folder / name for name in ("metrics.jsonl", "log.txt", "result.json", "env.json")]
        last = max([p.stat().st_mtime for p in signs if p.exists()], default=lines[-1]["start"])
        wall_s = round(max(0.0, last - lines[-1]["start"]), 3)
        journal.append(folder / "attempts.jsonl", {"end": last, "code": None, "wall_s": wall_s, "cpu_s": 0.0})

    # --- rows

    def row(self, cell: Cell, *, claimed: bool = False) -> Row | None:
        """What came out of a cell, if it is over for good (done or diverged).

        claimed: the caller holds its claim.
        """
        if cell.id not in self._rows:
            # Of a run that others start from its files are needed, not what came out.
            found = self._from_folder(cell, claimed) or (self.from_record(cell) if cell.purpose != "first" else None)
            if found is None:
                return None
            self._rows[cell.id] = found
        row = self._rows[cell.id]
        return dataclasses.replace(row, variant=cell.variant, purpose=cell.purpose)

    def over(self, cell: Cell) -> str:
        """How the run of a cell has ended, from what it left: "done", "diverged", "" for not yet."""
        folder = self.folder(cell)
        return "done" if (folder / "result.json").exists() else "diverged" if (folder / DIVERGED).exists() else ""

    def settle(self, cell: Cell) -> Row:
        """Make the row of a run that is over, and keep it.

        Raises:
          InputError: the run trained something else than the cell (the study's file was changed meanwhile).
        """
        folder = self.folder(cell)
        self._close_open_attempt(cell)
        row = self._read(cell, self.over(cell))
        journal.write(folder / "row.json", rows.plain(row))
        self._record(cell, row)
        self._rows[cell.id] = row
        return row

    def rows(self, cells: Sequence[Cell], *, failed: bool = True) -> list[Row]:
        """Rows of those cells that have one, in order; `failed` ones too."""
        found = [self.row(cell) or (self.failure(cell) if failed else None) for cell in cells]
        return [row for row in found if row is not None]

    def failure(self, cell: Cell) -> Row | None:
        """The row of a cell whose last run ended with an error; it has no values and does not count as finished."""
        lines = self.attempts(cell)
        return self._read(cell, "failed") if lines and lines[-1].get("failed") else None

    def _from_folder(self, cell: Cell, claimed: bool) -> Row | None:
        folder = self.folder(cell)
        found = journal.read(folder / "row.json")
        row = rows.from_plain(found) if found is not None else None
        if row is not None and self._judged(row, cell):
            self._record(cell, row)
            return row
        # The runner was killed between the end of the run and its row, or the run has outlived it.
        return self.settle(cell) if self.over(cell) and (claimed or not self.owner(cell)) else None

    def _record(self, cell: Cell, row: Row) -> None:
        """Keep a row, in place of one of the same run that the study's metric, chosen since, cannot be read from."""
        if self.recorded is None or self.from_record(cell) is not None:
            return
        kept = {**rows.plain(row), "config": _essential(cell.config)}
        journal.replace(self.recorded, lambda line: _is_of(line, cell), kept)

    def _recorded_lines(self) -> list[dict[str, Any]]:
        """Of results/studies/<study>.jsonl, read again when it has changed."""
        if self.recorded is None or not self.recorded.exists():
            return []
        found = self.recorded.stat()
        stamp = found.st_size, found.st_mtime_ns, found.st_ino
        if self._seen[0] != stamp:
            self._seen = stamp, list(journal.lines(self.recorded))
        return self._seen[1]

    def from_record(self, cell: Cell) -> Row | None:
        """The row of results/studies, if it has the study's metric."""
        for line in self._recorded_lines():
            if _is_of(line, cell):
                row = dataclasses.replace(rows.from_plain(line), cell=cell.id)
                return row if self._judged(row, cell) else None
        return None

    def _judged(self, row: Row, cell: Cell) -> bool:
        """Whether a kept row has the study's metric, which is not part of its cell."""
        return cell.purpose == "first" or row.status != "done" or self.study.metric in row.values

    def _read(self, cell: Cell, status: str) -> Row:
        folder = self.folder(cell)
        result = journal.read(folder / "result.json") or {}
        ran = journal.read(folder / "config.json")
        if ran is not None:
            self._check(cell, ran)
        written = metrics.read(folder)
        terms = self.study.terms
        values = rows.numbers(result, written)
        if status == "done" and cell.purpose != "first":
            lacks = [term for term in terms if term not in values]
            if lacks:
                raise InputError(
                    f"study '{self.study.name}': a run of '{cell.variant}' has no metric '{lacks[0]}'; "
                    f"it has {', '.join(sorted(k for k in values if '/' in k))}"
                )
            values[self.study.metric] = rows.difference([values[term] for term in terms])
            status = "done" if math.isfinite(values[self.study.metric]) else "diverged"
        examples = result.get("examples", {})
        ends = [line for line in self.attempts(cell) if "end" in line]
        starts = (journal.read(folder / "env.json") or {}).get("starts", [])
        seen = dict.fromkeys(term.removeprefix("best/").partition("/")[0] for term in terms)
        return Row(
            cell=cell.id, variant=cell.variant, seed=cell.seed, values=values,
            data_fingerprint=examples.get("train", ""),
            eval_fingerprint=" ".join(examples.get(name, "") for name in seen),
            overrides=self.overrides(cell), status=status, wall_s=round(sum(line["wall_s"] for line in ends), 3),
            cpu_s=round(sum(line["cpu_s"] for line in ends), 3), command=self.command(cell), purpose=cell.purpose,
            commit=starts[-1]["commit"] if starts else "unknown", curve=rows.curve(terms, written),
        )  # fmt: skip

    def _check(self, cell: Cell, ran: Mapping[str, Any]) -> None:
        changes = schema.difference(_essential(cell.config), _essential(ran))
        real = {leaf: pair for leaf, pair in changes.items() if leaf not in experiment.DERIVED or pair[0]}
        if cell.start:
            real.pop("init_from.path", None)  # the same run, by the folder it is in
        if real:
            leaf, (wanted, found) = next(iter(real.items()))
            raise InputError(
                f"study '{self.study.name}': the run of '{cell.variant}' seed {cell.seed} in {self.folder(cell)} has "
                f"{leaf} = {found!r}, not {wanted!r}: the study's file changed when it started; remove that folder"
            )


def _is_of(line: Mapping[str, Any], cell: Cell) -> bool:
    return line["cell"] == cell.id or (line["seed"] == cell.seed and same(line["config"], cell))


def same(old: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a finished run's config is that of the cell, but for leaves that did not exist then and are unset now."""
    changes = schema.difference(old, _essential(cell.config))
    return all(was == "(absent)" and leaf not in cell.given for leaf, (was, _) in changes.items())
