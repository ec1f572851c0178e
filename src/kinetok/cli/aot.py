"""``kinetok aot``."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from kinetok.cli.common import bar, example
from kinetok.errors import UserError, missing_package
from kinetok.files import check_file, whole_file

SCHEMA = 1
Row = Mapping[str, Any]
Key = tuple[str, str]


def register(app: typer.Typer) -> None:
    lines = "kinetok aot --op norm --arch sm_90", "kinetok aot --quick --check benchmarks/results/aot_3.7.1.json"
    app.command(epilog=example(*lines))(aot)


def aot(
    arch: Annotated[list[str] | None, typer.Option(help="Only this architecture (sm_90); may be repeated.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this family or kernel (fsq); may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only one configuration of each kernel.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the table to this file; rows not compiled now stay in it.")
    ] = None,
    check: Annotated[Path | None, typer.Option(help="Fail where this table, written before, differs.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Compile every kernel for each GPU architecture, no GPU needed; exit code 1 where one spills or is over its budget."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        raise missing_package("triton", "gpu", "kinetok aot") from None
    if json_file:
        check_file(json_file)
    before = _read(check, triton) if check else None
    kept = _read(json_file, triton) if json_file and json_file.exists() else []
    known, asked, rows = _compile(arch or [], op or [], quick, jobs)
    print(_table(rows))
    failures = [f"{row['kernel']} {row['arch']}: {problem}" for row in rows for problem in row["problems"]]
    differences = []
    if before is not None:
        differences = [*_changes(before, rows, asked), *([] if arch or op else _gone(before, known))]
    if json_file:
        new = {_key(row) for row in rows}
        _write(json_file, triton, [*rows, *(row for row in kept if _key(row) in known - new)])
    for difference in differences:
        print(difference)
    for failure in failures:
        print(f"FAILED {failure}")
    against = "" if check is None else f", {len(differences)} differences from {check}"
    print(f"{len(rows)} compiled with triton {triton}, {len(failures)} problems{against}")
    if failures or differences:
        raise typer.Exit(1)


def _compile(archs: Sequence[str], ops: Sequence[str], quick: bool, jobs: int) -> tuple[set[Key], set[Key], list[Row]]:
    """What there is, what of it ``archs`` and ``ops`` ask for, and the rows of that in a fixed order (quick: of some)."""
    from kinetok.kernels import machine_code

    architectures = [f"sm_{number}" for number in machine_code.SHARED_LIMIT]
    for arch in archs:
        if arch not in architectures:
            raise UserError(f"--arch: expected one of {', '.join(architectures)}, got {arch!r}")
    with _workers(min(jobs, os.cpu_count() or 1)) as submit:
        families = machine_code.families()
        work = submit(machine_code.names, families).result()
        for op in ops:
            if not any(op in (family, name) for family, name, _, _ in work):
                raise UserError(f"--op: expected one of {', '.join(families)} or a kernel of theirs, got {op!r}")
        chosen = [
            (family, name, arch, first)
            for family, name, arch, first in work
            if (not archs or f"sm_{arch}" in archs) and (not ops or family in ops or name in ops)
        ]
        compiled = [(family, name, arch) for family, name, arch, first in chosen if first or not quick]
        futures = [submit(machine_code.row, *item) for item in compiled]
        with bar("compiling", shown=True) as update:
            rows = []
            for done, future in enumerate(futures):
                update(done, len(futures), compiled[done][1])
                rows.append(future.result())
    known, asked = ({(name, f"sm_{arch}") for _, name, arch, _ in some} for some in (work, chosen))
    return known, asked, rows


@contextmanager
def _workers(count: int) -> Iterator[Callable[..., Any]]:
    """``submit`` of a pool of fresh processes: triton's interpreter may be on in this one, and is then for good."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.submit
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _table(rows: Iterable[Row]) -> str:
    """A line a kernel, a column an architecture: registers a thread, shared memory in KB, tensor-core instructions."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        if "registers" in row:
            text = f"{row['registers']:3} {row['shared'] / 1024:5.1f}K {' '.join(row['tensor_core'])}"
        else:
            text = "not compiled"
        cells.setdefault(row["kernel"], {})[row["arch"]] = text + (" !" if row["problems"] else "")
    first = max([len(name) for name in cells], default=0)
    widths = {arch: max([len(line.get(arch, "")) for line in cells.values()] + [len(arch)]) for arch in archs}
    lines = ["  ".join((" " * first, *(arch.ljust(widths[arch]) for arch in archs)))]
    for name, line in cells.items():
        lines.append("  ".join((name.ljust(first), *(line.get(arch, "").ljust(widths[arch]) for arch in archs))))
    return "\n".join(line.rstrip() for line in lines)


def _write(path: Path, triton: str, rows: Iterable[Row]) -> None:
    """One row a line, sorted, so that a change of one kernel is one line of a diff."""
    ordered = sorted(rows, key=lambda row: (row["kernel"], int(row["arch"][3:])))
    lines = ",\n".join(json.dumps(row) for row in ordered)
    with whole_file(path) as temporary:
        temporary.write_text(f'{{"schema": {SCHEMA}, "triton": "{triton}", "rows": [\n{lines}\n]}}\n')


def _read(path: Path, triton: str) -> list[Row]:
    """The rows of a table of this triton."""
    try:
        table = json.loads(path.read_text())
        known = table["schema"] == SCHEMA and all({"kernel", "arch"} <= set(row) for row in table["rows"])
    except OSError as error:
        raise UserError(
            f"cannot read the table {path}: {error.strerror or error}. Write one: kinetok aot --json {path}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: expected a table that kinetok aot --json wrote") from error
    if not known or not isinstance(table.get("triton"), str):
        raise UserError(f"{path}: expected a table of kinetok aot --json, schema {SCHEMA}")
    if table["triton"] != triton:
        raise UserError(f"{path}: expected a table of triton {triton}, got one of triton {table['triton']}")
    rows: list[Row] = table["rows"]
    return rows


def _key(row: Row) -> Key:
    return row["kernel"], row["arch"]


def _changes(before: Iterable[Row], after: Iterable[Row], asked: Iterable[Key]) -> Iterator[str]:
    """A line for each configuration asked for that the table lacks, and for each figure that differs."""
    old, new = ({_key(row): row for row in rows} for rows in (before, after))
    yield from (f"new: {' '.join(key)}" for key in sorted(set(asked) - set(old)))
    for key, row in new.items():
        for name in row if key in old else ():
            if row[name] != old[key].get(name):
                yield f"changed: {' '.join(key)}: {name} {old[key].get(name)} -> {row[name]}"


def _gone(before: Iterable[Row], known: set[Key]) -> Iterator[str]:
    """A line for each row of the table that nothing in the kernels stands for any more."""
    yield from (f"gone: {' '.join(key)}" for key in map(_key, before) if key not in known)
