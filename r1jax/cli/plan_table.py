# SPDX-License-Identifier: Apache-2.0
"""What `r1jax plan` prints: tables, by rich on a terminal, as aligned text elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

_NOTHING = "–"


def write_plan(facts: Mapping[str, Any], out: TextIO) -> None:
    """The tables of one plan: memory, network, arithmetic and time, and what was assumed."""
    mesh = _mesh(facts["mesh"])
    out.write(f"{facts['what']} on {facts['topology']}: {facts['devices']} devices, mesh {mesh}\n")
    _table("memory of a device, GB", ("what", "GB"), _memory(facts), out)
    if facts["seconds"] is not None:
        _table("sent by a device, GB a step", ("kind", "axes", "GB"), _network(facts), out)
        _table("arithmetic and time", ("what", ""), _time(facts), out)
    out.write("\nassumed:\n")
    out.writelines(f"- {line}\n" for line in facts["assumptions"])


def write_search(found: Sequence[Mapping[str, Any]], out: TextIO) -> None:
    """The settings of a search, the best first."""
    headings = ("mesh", "rows", "pieces", "remat", "GB", "fits", "tokens/s", "MFU", "compiled")
    _table("settings, the best first", headings, map(_setting, found), out)


def _memory(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield from ((k, f"{v:.2f}") for k, v in facts["arguments_by_part_gb"].items())
    yield "arguments, as laid out", f"{facts['arguments_gb']:.2f}"
    if facts["activations_gb"] is not None:
        yield "kept from layer to layer (in temporaries)", f"{facts['activations_gb']:.2f}"
        yield "gradients of stacked layers (in temporaries)", f"{facts['gradients_gb']:.2f}"
    yield "temporaries", f"{facts['temporaries_gb']:.2f}"
    if facts["host_gb"]:
        yield "in the host's memory", f"{facts['host_gb']:.2f}"
    yield "all of the device's", f"{facts['hbm_per_chip_gb']:.2f}"
    yield "there is", f"{facts['hbm_available_gb']:.2f}"


def _network(facts: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for kind, axes in sorted(facts["collectives_gb"].items()):
        for name, gb in sorted(axes.items(), key=lambda item: -item[1]):
            yield kind, name, f"{gb:,.3f}"
    yield "all", "", f"{facts['collective_gb']:,.3f}"


def _time(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    model, counted = facts["model_flops"], facts["counted_flops"]
    yield "the model asks for", f"{model:.4g} FLOP"
    yield "the program does", f"{counted:.4g} FLOP, {counted / model:.3f} times that"
    yield "memory traffic of a device", f"{facts['hbm_traffic_gb']:,.1f} GB"
    names = {"compute": "arithmetic", "memory": "memory", "interconnect": "interconnect"}
    for key, name in (names | {"network": "between slices"}).items():
        yield f"seconds of {name}", f"{facts['seconds'][key]:.4g}"
    for kind, spent in sorted(facts["collectives_seconds"].items()):
        yield f"{kind}, and waited for", f"{spent['sent']:.4g} s, {spent['waited']:.4g} s"
    ways = ("overlapped", "all overlapping"), ("scheduled", "as scheduled")
    for key, name in (*ways, ("serial", "one after the other")):
        seconds, speed = facts["seconds"][key], facts["tokens_per_second"][key]
        mfu = 100 * facts["mfu"][key]
        yield f"a step, {name}", f"{seconds:.4g} s, {speed:,.0f} tokens/s, MFU {mfu:.1f} %"
    took, worked = facts["compile_seconds"], facts["compile_processor_seconds"]
    yield "compiled in", f"{took:.0f} s, {worked:.0f} s of processors"


def _setting(facts: Mapping[str, Any]) -> tuple[str, ...]:
    setting, speed, mfu = facts["setting"], facts.get("tokens_per_second"), facts.get("mfu")
    known = "failed" not in facts
    return (
        _mesh(facts["mesh"]),
        str(setting["rows"]),
        str(setting["micro_batches"]),
        "yes" if setting["remat"] else "no",
        f"{facts['hbm_per_chip_gb']:.1f}" if known else _NOTHING,
        ("yes" if facts["fits"] else "no") if known else "fails",
        f"{speed['scheduled']:,.0f}" if speed else _NOTHING,
        f"{100 * mfu['scheduled']:.0f} %" if mfu else _NOTHING,
        f"{facts['compile_seconds']:.0f} s" if known else _NOTHING,
    )


def _mesh(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{name} {n}" for name, n in sizes.items() if n > 1) or "one device"


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], out: TextIO) -> None:
    """Numbers to the right, the first column and names to the left."""
    rows = [tuple(row) for row in rows]
    right = [_numeric(row[i] for row in rows) for i in range(len(headings))]
    if out.isatty():
        table = Table(*headings, title=title, title_justify="left", box=None, pad_edge=False)
        for column, to_right in zip(table.columns, right, strict=True):
            column.justify = "right" if to_right else "left"
        for row in rows:
            table.add_row(*row)
        out.write("\n")
        Console(file=out).print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    out.write(f"\n{title}\n")
    for row in [tuple(headings), *rows]:
        cells = zip(row, widths, right, strict=True)
        line = "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells)
        out.write(f"  {line}".rstrip() + "\n")


def _numeric(cells: Iterable[str]) -> bool:
    return all(cell[:1].isdigit() or cell == _NOTHING for cell in cells)
