# SPDX-License-Identifier: Apache-2.0
"""The table of what fits where: the 671B on TPU pods, compiled here, without one.

Every row is kept as soon as it is known, and the same command goes on where it stopped. A row takes
minutes and some GB; libtpu must be installed.

    python experiments/plan_table.py [--out runs/plan/table.jsonl] [--only v5p-1024 | --only decode]
"""

import argparse
import sys
from pathlib import Path

import jax

from r1jax.cli import overrides
from r1jax.config import PlanConfig, from_config_dict
from r1jax.parallel.topology import parse
from r1jax.train.plan_search import once

CONFIG = Path(__file__).parents[1] / "configs" / "v3_671b.py"
FP8 = ("model.fp8.enabled", "true")
ROWS = (
    ("v5p-1024", "grpo", ()),
    ("v5p-1024", "decode", ()),
    ("tpu7x-256", "decode", ()),
    ("tpu7x-256", "decode", (FP8,)),
    ("v6e-256", "decode", (("sampling.layout", "training"),)),
    ("v6e-256", "decode", (("grpo.prompts", "16"), ("mesh.expert", "128"), ("mesh.tensor", "2"))),
    ("v5p-1024", "train", ()),
    ("v5p-1024", "train", (("rows_per_device", "6"), ("length", "8192"))),
    ("2xv6e-256", "train", (("rows_per_device", "1"), ("model.moe.dispatch_pieces", "16"))),
    ("tpu7x-256", "train", (FP8,)),
)
HEADINGS = ("pod", "program", "changed", "chips", "mesh", "rows × tokens", "GB a device", "fits",
            "GB sent", "FLOP ratio", "MFU: bounds, scheduled", "compiled, processors")  # fmt: skip


def row(facts: dict, cfg: PlanConfig, changes: tuple[tuple[str, str], ...]) -> list[str]:
    """Cells of the table."""
    mesh = " × ".join(f"{name} {n}" for name, n in facts["mesh"].items() if n > 1)
    length = cfg.length if facts["what"] == "train" else cfg.sampled_length
    changed = ", ".join("=".join(change) for change in changes) or "–"
    first = [facts["topology"], facts["what"], changed, str(parse(facts["topology"]).chips), mesh]
    first.append(f"{facts['setting']['rows']} × {length}")
    if "failed" in facts:
        return [*first, "–", "fails", "–", "–", "–", "–"]
    memory = f"{facts['hbm_per_chip_gb']:.1f} of {facts['hbm_available_gb']:.1f}"
    took = f"{facts['compile_seconds']:.0f} s, {facts['compile_processor_seconds']:.0f} s"
    if facts["seconds"] is None:
        return [*first, memory, "no", "–", "–", "–", took]
    ratio = facts["counted_flops"] / facts["model_flops"]
    mfu = "{serial:.1%}–{overlapped:.1%}, {scheduled:.1%}".format(**facts["mfu"])
    fits, gb = "yes" if facts["fits"] else "no", facts["collective_gb"]
    sent = f"{gb:,.0f}" if gb > 1 else f"{gb:.2f}"
    return [*first, memory, fits, sent, f"{ratio:.2f}", mfu, took]


def main() -> None:
    """Compiles what is not known yet and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/plan/table.jsonl"))
    parser.add_argument("--only", help="rows of this pod, or of this program, alone")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for name, what, changes in ROWS:
        if args.only in (None, name, what):
            tree = overrides.load(CONFIG)
            overrides.apply(tree, changes)
            cfg = from_config_dict(PlanConfig, tree)
            lines.append(row(once(cfg, parse(name), what, out=args.out)[0], cfg, changes))
            print(f"{name} {what}: {' '.join(lines[-1][6:])}", file=sys.stderr)
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


if __name__ == "__main__":
    main()
