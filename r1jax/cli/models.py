# SPDX-License-Identifier: Apache-2.0
"""The verbs about models: import, export, generate, chat, info."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MODEL = """\
MODEL is a Hugging Face folder (config.json and safetensors), a folder that r1jax
import wrote, a .gguf file, or a run: runs/quickstart, runs/quickstart/student_qwen2.
"""
_IMPORT = """\
Reads a Hugging Face checkpoint (DeepSeek-V3/R1, Qwen2, Qwen3, Llama) or a .gguf file
into DST, tensor by tensor and bit for bit: FP8 blocks stay FP8, the multi-token-
prediction layer and the router biases come along. What is not supported is refused by
name. DST appears whole or not at all.
"""
_EXPORT = """\
Writes a model as a Hugging Face checkpoint that transformers loads. What was imported
comes out bit for bit; --dtype fp8 writes DeepSeek's 128 x 128 blocks.

"""
_GENERATE = """\
Answers a prompt, streaming. With a chat template the prompt is a user's turn; --raw
takes it as it is. --draft N lets the checkpoint's own multi-token-prediction module
draft up to N tokens a round, which the model verifies in one pass: the distribution of
the answers is the same, greedy answers are token for token. It drafts while that is
expected to be faster; --draft-always drafts all the same, to see how many are
accepted. --rerank K drafts K
continuations of N tokens instead and keeps the one the model finds likeliest, whole:
this changes the distribution.

"""
_CHAT = """\
A conversation in the terminal; an empty line or Ctrl-D ends it.

"""
_INFO = """\
Parameters in all and active for a token, bytes, cache and arithmetic of a model, or of
the architecture of a config file:  r1jax info --config=configs/v3_671b.py

"""
VERBS = ("import", "export", "generate", "chat", "info")
DTYPES = {"stored": "stored", "float32": "float32", "bf16": "bfloat16"}


def add_verbs(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Adds the verbs; `add(name, about)` makes the parser of one."""
    verb = add("import", _IMPORT)
    verb.add_argument("source", metavar="SRC", type=Path, help="folder, .gguf file or Hub name")
    verb.add_argument("out", metavar="DST", type=Path, help="folder to make")
    verb.add_argument(
        "--dtype", choices=DTYPES, default="stored", help="of the weights (default: as they are)"
    )
    _ignore(verb)
    verb = add("export", _EXPORT + _MODEL)
    verb.add_argument("source", metavar="MODEL", type=Path)
    verb.add_argument("out", metavar="DST", type=Path, help="folder to make")
    kinds = ("stored", "float32", "bf16", "fp8")
    verb.add_argument("--dtype", choices=kinds, default="stored", help="default: as they are")
    verb = add("generate", _GENERATE + _MODEL)
    _sampling(verb)
    verb.add_argument("--prompt", required=True, help="the text, or - for standard input")
    verb.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    verb.add_argument("--json", action="store_true", help="print one JSON object at the end")
    _sampling(add("chat", _CHAT + _MODEL))
    verb = add("info", _INFO + _MODEL)
    verb.add_argument("source", metavar="MODEL", type=Path, nargs="?")
    verb.add_argument("--config", metavar="FILE", help="a config file with a model in it")
    verb.add_argument("--json", action="store_true", help="print JSON")
    _ignore(verb)


def _ignore(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="a field of config.json that changes nothing in the forward pass",
    )


def _sampling(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("source", metavar="MODEL", type=Path)
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--top-p", type=float, default=0.95, help="nucleus (default: 0.95; 1 is all)")
    add("--max-tokens", type=int, default=None, help="of an answer (default: 512, if they fit)")
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--draft", type=int, default=0, metavar="N", help="most tokens drafted a round")
    add("--draft-always", action="store_true", help="also where it is not expected to pay")
    add("--rerank", type=int, default=0, metavar="K", help="keep the best of K drafts, unverified")
    add("--system", default=None, help="the system turn, if the template has one")
    add("--dtype", choices=DTYPES, default="stored", help="of the weights (default: as they are)")
    about = "multiply in E4M3 by DeepSeek's recipe; blocks of the checkpoint as they are"
    add("--fp8", action="store_true", help=about)
    _ignore(verb)


def run(args: argparse.Namespace) -> None:
    """Runs the verb of `args`."""
    if args.verb == "import":
        _import(args)
    elif args.verb == "export":
        _export(args)
    elif args.verb == "info":
        _info(args)
    elif args.verb == "generate":
        _generate(args)
    else:
        _chat(args)


def _say(text: str) -> None:
    print(f"r1jax: {text}", file=sys.stderr)


class _Reading:
    """A line of progress on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, what: str):
        self.what, self.shown, self.drew = what, time.monotonic(), False

    def __call__(self, done: int, total: int) -> None:
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if now - self.shown < (0.1 if terminal else 10.0):
            return
        self.shown, self.drew = now, terminal
        end = "\r" if terminal else "\n"
        print(f"{self.what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", end=end, file=sys.stderr)

    def end(self) -> None:
        """Leaves the line."""
        if self.drew:
            print(file=sys.stderr)


def opened(args: argparse.Namespace) -> Any:
    """The model that `args.source` names."""
    from r1jax.io.model import open_model
    from r1jax.train.trained import is_run, open_run

    if is_run(args.source):
        return open_run(args.source)
    progress = _Reading(f"reading {args.source}")
    dtype = DTYPES[args.dtype] if args.verb != "export" else "stored"
    ignore = tuple(getattr(args, "ignore_field", ()))
    model = open_model(args.source, dtype=dtype, ignore=ignore, progress=progress)
    progress.end()
    return model


def _import(args: argparse.Namespace) -> None:
    from r1jax.io.hub import fetched
    from r1jax.io.model import save_model
    from r1jax.io.shards import free

    free(args.out)
    args.source = fetched(args.source)
    began = time.monotonic()
    model = opened(args)
    save_model(args.out, model)
    _say(f"{args.out}: written in {time.monotonic() - began:.1f} s")
    _print_info(model.cfg, model.module)


def _export(args: argparse.Namespace) -> None:
    from r1jax.io.model import export_model
    from r1jax.io.shards import free

    free(args.out)
    began = time.monotonic()
    total = export_model(args.out, opened(args), dtype=args.dtype)
    size = f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.2f} MB"
    _say(f"{args.out}: {size} written in {time.monotonic() - began:.1f} s")


def _info(args: argparse.Namespace) -> None:
    if (args.source is None) == (args.config is None):
        raise ValueError("info takes a MODEL or --config=FILE, one of them")
    if args.config is not None:
        _print_info(_config_of(args.config), None, as_json=args.json)
        return
    from r1jax.train.trained import is_run, open_run

    if is_run(args.source):
        model = open_run(args.source)
        _print_info(model.cfg, model.module, as_json=args.json)
        return
    args.dtype = "stored"
    model = opened(args)
    _print_info(model.cfg, model.module, as_json=args.json)


def _config_of(path: str) -> Any:
    from r1jax import config as schema
    from r1jax.cli import overrides

    tree = overrides.load(path)
    section = tree.model if "model" in tree else tree
    kind = schema.ModelConfig if "mla" in section else schema.DenseConfig
    return schema.from_config_dict(kind, section)


def _print_info(cfg: Any, module: Any, *, as_json: bool = False) -> None:
    from r1jax.cli.sizes import facts, write_facts

    found = facts(cfg, module)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        write_facts(found, sys.stdout)


def _settings(args: argparse.Namespace, model: Any, prompt_tokens: int) -> Any:
    from r1jax.infer.generate import Sampling

    room = model.cfg.max_position - prompt_tokens
    most = args.max_tokens if args.max_tokens is not None else max(min(512, room), 1)
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=most,
        eos_ids=model.tokenizer.eos_ids,
        drafts=args.draft,
        always=args.draft_always,
        rerank=args.rerank,
        seed=args.seed,
    )


def _answer(
    args: argparse.Namespace,
    model: Any,
    ids: list[int],
    show: Callable[[str], Any],
    kept: Any = None,
):
    """(text, generation, seconds) of one answer, shown as it comes, after what an earlier kept."""
    from r1jax.infer.generate import Generation

    generation = Generation(model.module, [ids], _settings(args, model, len(ids)), kept=kept)
    stream, parts, began = model.tokenizer.stream(), [], time.monotonic()
    ends = set(model.tokenizer.eos_ids)
    for (new,) in generation:
        text = "".join(stream.push(token) for token in new if token not in ends)
        parts.append(text)
        show(text)
    parts.append(stream.flush())
    show(parts[-1])
    return "".join(parts), generation, time.monotonic() - began


def _report(args: argparse.Namespace, counts: Any, seconds: float) -> None:
    line = f"{counts.tokens} tokens, {counts.tokens / seconds:.1f} a second (compilation included)"
    if counts.drafted:
        kept = f"{100 * counts.acceptance:.0f} % accepted"
        fate = f"best of {args.rerank} kept" if args.rerank else kept
        line += f"; {counts.drafted} drafted, {fate}, {counts.tokens_per_pass:.2f} tokens a pass"
    elif args.draft and not args.draft_always:
        line += "; nothing drafted: not expected to pay here (--draft-always drafts)"
    if counts.reused:
        line += f"; {counts.reused} tokens of the conversation were in the cache"
    _say(line)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _with_tokenizer(args: argparse.Namespace) -> Any:
    from r1jax.infer.generate import prepared
    from r1jax.io.model import in_fp8

    model = opened(args)
    if model.tokenizer is None:
        raise ValueError(f"{args.source}: has no tokenizer.json, so it cannot read a prompt")
    model = in_fp8(model) if args.fp8 else model
    return dataclasses.replace(model, module=prepared(model.module))


def _generate(args: argparse.Namespace) -> None:
    model = _with_tokenizer(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.raw or model.tokenizer.chat_template is None:
        ids = model.tokenizer.encode(prompt)
    else:
        system = [{"role": "system", "content": args.system}] if args.system else []
        ids = model.tokenizer.chat_ids([*system, {"role": "user", "content": prompt}])
    text, done, seconds = _answer(args, model, ids, (lambda _: None) if args.json else _write)
    if args.json:
        found = dict(text=text, seconds=seconds, **done.counts._asdict())
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        print()
    _report(args, done.counts, seconds)


def _chat(args: argparse.Namespace) -> None:
    model = _with_tokenizer(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    prompt, kept = "> " if os.isatty(0) else "", None
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            break
        if not line:
            break
        messages.append({"role": "user", "content": line})
        ids = model.tokenizer.chat_ids(messages)
        text, done, seconds = _answer(args, model, ids, _write, kept)
        kept = done.kept
        print()
        _report(args, done.counts, seconds)
        messages.append({"role": "assistant", "content": text})
