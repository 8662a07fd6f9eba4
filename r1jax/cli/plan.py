# SPDX-License-Identifier: Apache-2.0
"""The verb `plan`: a step compiled for a TPU pod that need not be there."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ABOUT = """\
Compiles the real step for a TPU pod with the TPU compiler, which needs no TPU, and
says whether it fits, what lies in the memory of a chip, what crosses the network by
kind and by axis of the mesh, how much arithmetic is done beside what the model asks
for, and between which bounds a step's time lies. pip install libtpu once; a plan of
the 671B takes minutes and a few GB.

  --what=train    one optimizer step: packed rows, MTP, bias update (the default)
  --what=grpo     one GRPO step: reference, policy, group advantages, KL, update
  --what=decode   one token for every row of a GRPO batch, at the end of its context,
                  the weights lying where sampling.layout has them

NAME is a pod as Google names it: v5p-1024, v4-1024 and tpu7x-256 count TensorCores
(two a chip), v5e-256 and v6e-256 chips; 2xv6e-256 is two slices; v5p:8x8x8 is a torus.
Any field is changed by its path. The mesh must multiply to the pod's devices; left at
one device, a mesh is chosen that suits the program:

  --config.mesh.fsdp=64   --config.mesh.expert=8    --config.rows_per_device=6
  --config.length=8192    --config.micro_batches=2  --config.model.remat=False

--search tries meshes, batches and recomputation from the config on, writes what it
finds to a file, and prints the best that fit; the same command goes on where it
stopped. Times are bounds: all four resources at their peak, overlapping or one after
the other. Exit status: 0 it fits, 1 it does not, 2 the input is wrong.
"""


def add_verb(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Adds the verb; `add(name, about)` makes its parser."""
    from_what = ("train", "grpo", "decode")
    option = add("plan", _ABOUT).add_argument
    option("--config", required=True, metavar="FILE", help="a config file with a plan in it")
    option("--topology", required=True, metavar="NAME", help="the pod: v5p-1024, 2xv6e-256, …")
    option("--what", choices=from_what, default="train", help="the program (default: train)")
    option("--json", action="store_true", help="print one JSON object")
    option("--picture", type=Path, metavar="FILE", help="draw memory and times (.png, .svg, .pdf)")
    option("--search", type=int, metavar="N", help="try N settings and print the best that fit")
    option(
        "--out", type=Path, metavar="FILE", help="where --search keeps what it finds, JSON lines"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb of `args`; the exit status."""
    from r1jax import config as schema
    from r1jax.cli import overrides
    from r1jax.parallel import topology

    if args.out is not None and args.search is None:
        raise ValueError("--out belongs to --search")
    pod = topology.parse(args.topology)
    if args.picture is not None and args.picture.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--picture={args.picture}: a name ending in .png, .svg or .pdf")
    tree = overrides.load(args.config)
    if "rows_per_device" not in tree:
        raise ValueError(
            f"--config={args.config}: no plan in it (r1jax.config.PlanConfig makes one; see "
            "configs/v3_671b.py)"
        )
    overrides.apply(tree, args.overrides)
    cfg = schema.from_config_dict(schema.PlanConfig, tree)
    topology.need_compiler()
    import jax

    jax.config.update("jax_platforms", "cpu")  # the compiler needs no chip, and takes none
    if args.search is not None:
        return _search(args, cfg, pod)
    return _plan(args, cfg, pod)


def _plan(args: argparse.Namespace, cfg: Any, pod: Any) -> int:
    from r1jax.cli.plan_table import write_plan
    from r1jax.train.plan import mesh_for, plan
    from r1jax.train.plan_report import report, verdict

    mesh_for(cfg, pod, args.what)  # what does not go together is said before anything is compiled
    _say(f"compiling {args.what} for {pod.name}: {pod.devices} devices of {pod.chips} chips …")
    found = plan(cfg, pod, args.what)
    facts = report(found, cfg)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        write_plan(facts, sys.stdout)
    if args.picture is not None:
        from r1jax.eval.plan_picture import draw

        draw(facts, args.picture)
        _say(f"{args.picture}: drawn")
    _say(verdict(found, cfg))
    return 0 if found.fits else 1


def _search(args: argparse.Namespace, cfg: Any, pod: Any) -> int:
    from r1jax.cli.plan_table import write_search
    from r1jax.train.plan_search import search

    if args.search < 1:
        raise ValueError(f"--search={args.search}: try at least one setting")
    if args.picture is not None:
        raise ValueError("--picture draws one plan: choose a setting and leave --search out")
    name = f"{Path(args.config).stem}_{pod.name}_{args.what}.jsonl"
    out = args.out or Path("runs") / "plan" / name
    found = search(cfg, pod, args.what, out=out, tries=args.search, say=_say)
    fitting = [f for f in found if f["fits"]]
    if args.json:
        print(json.dumps({"best": fitting[:1], "tried": found}, indent=2, ensure_ascii=False))
    else:
        write_search(found, sys.stdout)
    _say(f"{len(fitting)} of {len(found)} settings fit; all of them are in {out}")
    return 0 if fitting else 1


def _say(text: str) -> None:
    print(f"r1jax: {text}", file=sys.stderr)
