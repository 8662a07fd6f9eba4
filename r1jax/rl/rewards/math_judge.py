# SPDX-License-Identifier: Apache-2.0
"""Whether two mathematical answers are equal, by math-verify and sympy. Runs in a worker process.

No r1jax and no JAX here: the pool loads this file by its path. Two things are changed in
math-verify 0.9: its own time limit by `signal.alarm` is off (the pool has the deadline, and kills);
and sympy's `parse_expr`, which ends in `eval` even for `Number("58")`, is replaced by a walk over
the syntax tree of plain arithmetic, and for single numbers by a pattern.
"""

import ast
import functools
import logging
import re

import sympy
import sympy.physics.units  # reads its own names by `parse_expr`: before that is replaced
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, parser, verify
from sympy.parsing import sympy_parser

EXTRACTORS = {"latex": LatexExtractionConfig, "expr": ExprExtractionConfig}
BOXED = r"\boxed{"
MATHS_SIGNS = ("$", r"\(", r"\[", BOXED)
WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
COMMANDS = re.compile(r"\\[A-Za-z]+\s*(\{[^{}]*\})?")
# Of a batch's golds, each asked about once a sample: parsed once.
GOLDS_KEPT = 512
MAX_ARITHMETIC_CHARS = 1000
NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)", re.ASCII)
GROUPED = re.compile(r"-?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", re.ASCII)


def number(text: str, *ignored: object, **ignored_too: object) -> sympy.Number:
    """Stands in for sympy's `parse_expr` where sympy reads a number; keeps all its decimals.

    Raises:
      SyntaxError: anything but a decimal number.
    """
    if not (found := NUMBER.fullmatch(text.strip())):
        raise SyntaxError("no number")
    return sympy.Float(found.group()) if "." in text else sympy.Integer(int(found.group()))


def build(node: ast.expr, text: str) -> sympy.Expr:
    """The sympy expression of a syntax tree of + - * / ** and numbers, nothing evaluated."""
    match node:
        case ast.Constant():
            return number(ast.get_source_segment(text, node))
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return build(operand, text)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return sympy.Mul(sympy.Integer(-1), build(operand, text), evaluate=False)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = build(left, text), build(right, text)
        case _:
            raise SyntaxError(f"{type(node).__name__} is no arithmetic")
    match op:
        case ast.Add():
            return sympy.Add(a, b, evaluate=False)
        case ast.Sub():
            negative = sympy.Mul(sympy.Integer(-1), b, evaluate=False)
            return sympy.Add(a, negative, evaluate=False)
        case ast.Mult():
            return sympy.Mul(a, b, evaluate=False)
        case ast.Div():
            inverse = sympy.Pow(b, sympy.Integer(-1), evaluate=False)
            return sympy.Mul(a, inverse, evaluate=False)
        case ast.Pow():
            return sympy.Pow(a, b, evaluate=False)
    raise SyntaxError(f"{type(op).__name__} is no arithmetic")


def arithmetic(text: str, evaluate: bool = False) -> sympy.Expr:
    """Stands in for sympy's `parse_expr` on plain arithmetic; `evaluate` is accepted and unused.

    Raises:
      SyntaxError: anything but numbers and + - * / ** and parentheses.
    """
    if len(text) > MAX_ARITHMETIC_CHARS or not text.isascii():
        raise SyntaxError("no arithmetic of this length or alphabet")
    text = text.strip()
    return build(ast.parse(text, mode="eval").body, text)


def no_evaluation(*arguments: object, **keywords: object) -> None:
    """In the place of sympy's `eval_expr`: text is not run here, by whatever way it comes."""
    raise PermissionError("text is not evaluated in a worker")


def extract(text: str, kinds: tuple[str, ...]) -> list:
    """What math-verify reads in a text."""
    return parse(text, [EXTRACTORS[kind]() for kind in kinds], parsing_timeout=None)


raw_gold = functools.lru_cache(GOLDS_KEPT)(extract)


def readings(text: str) -> list:
    """What an answer without a frame can mean.

    A number as it stands. Else all of it as one formula, so that "57, 58" is a set and not the
    number that stands last. Prose ("the total is 58 apples") is read as it stands instead.
    """
    plain = text.replace(",", "") if GROUPED.fullmatch(text) else text
    if NUMBER.fullmatch(plain):  # most answers, and a hundredth of the time of the LaTeX parser
        return [number(plain), plain]
    framed = any(sign in text for sign in MATHS_SIGNS)
    prose = len(WORDS.findall(COMMANDS.sub(" ", text))) > 1
    return extract(text if framed or prose else f"{BOXED}{text}}}", tuple(EXTRACTORS))


gold_readings = functools.lru_cache(GOLDS_KEPT)(readings)


def judge(item: dict) -> float:
    """1 if `answer` equals `gold`, else 0.

    Args:
      item: `gold` and `answer`, texts; by choice math-verify's `precision`, `strict`,
        `allow_set_relation_comp`; `raw` says that math-verify reads both texts as they stand, and
        `match_types` how.

    Returns:
      1.0 or 0.0.
    """
    gold, answer = item["gold"].strip(), item["answer"].strip()
    if not gold or not answer:
        return 0.0
    options = {
        "float_rounding": item.get("precision", 6),
        "strict": item.get("strict", True),
        "allow_set_relation_comp": item.get("allow_set_relation_comp", False),
        "timeout_seconds": None,
    }
    if item.get("raw", False):
        kinds = tuple(item.get("match_types", EXTRACTORS))
        return float(verify(raw_gold(gold, kinds), extract(answer, kinds), **options))
    if gold == answer:
        return 1.0
    return float(verify(gold_readings(gold), readings(answer), **options))


def warm_up() -> None:
    """Compiles the expressions and tables that the first answers would wait for."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # told once: no time limit of its own
    parser.parse_expr = arithmetic
    sympy_parser.parse_expr = number  # `Number(text)` and `sympify(text)` come here
    sympy_parser.eval_expr = no_evaluation
    pairs = [(r"\frac{1}{2}", "0.5"), ("x+1", "1+x"), ("2", "the sum is 1 + 1"), ("3", "4")]
    for gold, answer in pairs:
        judge({"gold": gold, "answer": answer})


warm_up()
