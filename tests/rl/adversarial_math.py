# SPDX-License-Identifier: Apache-2.0
"""Completions that try to hang, crash, fill or fool the mathematics reward; none is right."""

import itertools

POWERS = [
    r"10^{10^{10}}",
    r"9^{9^{9^{9}}}",
    r"2^{2^{2^{2^{2^{2^{2}}}}}}",
    r"99999999^{99999999}",
    r"(-7)^{10^{15}}",
    r"0.1^{10^{12}}",
    r"\frac{10^{10^{9}}}{10^{10^{9}}-1}",
    r"7^{7^{7^{7}}} \mod 10",
    r"\sqrt{10^{10^{8}}}",
    r"(10^{9})!",
    r"(((10!)!)!)!",
    r"9!!!!!!!!!",
    r"10^{7}! / 9999999!",
    r"\binom{10^{9}}{5 \cdot 10^{8}}",
    r"\binom{10^{30}}{10^{29}}",
    r"e^{e^{e^{e^{79}}}}",
    r"\pi^{\pi^{\pi^{\pi}}}",
    r"\log(10^{10^{10}})",
    r"\lfloor e^{10^{6}} \rfloor",
    r"\lfloor \pi \cdot 10^{5000000} \rfloor",
]
PLAIN = [
    "9**9**9**9**9",
    "9^9^9^9^9",
    "10**10**10 - 10**10**10",
    "1/(10**1000000000)",
    "2**99999999999 / 2**99999999998",
    "(" * 3000 + "7" + ")" * 3000,
    "-" * 5000 + "7",
    "1" + "+1" * 9000,
    "1" + "/1" * 9000,
    "1-" * 9000 + "1",
    "2*" * 400 + "2",
    "9" * 19_000,
    "0." + "3" * 19_000,
    "9" * 19_000 + "/" + "9" * 900,
    "1e999999999",
    "0x7",
    "7j",
    "7_0",
    "nan",
    "inf",
    "-inf",
    "None",
    "True",
]
SERIES = [
    r"\sum_{i=1}^{10^{9}} \frac{1}{i^2}",
    r"\sum_{n=1}^{\infty} \frac{\sin(n!)}{n^{1.1}}",
    r"\sum_{i=1}^{1000000} i!",
    r"\prod_{i=1}^{10^{8}} (1+\frac{1}{i})",
    r"\prod_{p=1}^{\infty} \cos(p^{p})",
    r"\int_{0}^{\infty} \frac{\sin(x^{x})}{x^{x^{x}}} dx",
    r"\int \int \int e^{x^2 y^2 z^2 \sin(xyz)} dx dy dz",
    r"\lim_{x \to 0} \frac{\sin(\tan x) - \tan(\sin x)}{x^{77}}",
    r"\lim_{n \to \infty} (1+\frac{1}{n!})^{n^{n}}",
    r"\frac{d^{500}}{dx^{500}} \sin(\cos(\tan(x)))",
]
SETS = [
    r"\{" + ",".join(str(i) for i in range(3000)) + r"\}",
    r"\{" + ",".join(f"x_{{{i}}}" for i in range(1500)) + r"\}",
    r"\cup ".join(f"({i},{i + 0.5})" for i in range(600)),
    r"\cup ".join(f"[\\sqrt{{{i}}},\\sqrt{{{i}}}+\\frac{{1}}{{{i + 2}}}]" for i in range(300)),
    r"(-10^{10^{9}}, 10^{10^{9}})",
    r"(0, 10^{10^{10}}) \cap [9^{9^{9^{9}}}, \infty)",
    r"\mathbb{R} \setminus \{" + ",".join(f"\\sqrt{{{i}}}" for i in range(500)) + r"\}",
    r"\{x : x^{100} - x^{99} + \sin(x) = 0\}",
    "(" + ",".join("7" for _ in range(5000)) + ")",
]
SYMBOLS = [
    r"(x+1)^{1000000}",
    r"(x+y+z+w)^{300} - (x+y+z)^{299}",
    r"\prod_{k=1}^{60}(x^{k}+y^{k})",
    r"\frac{(x^{1000}-1)^{50}}{(x-1)^{50}}",
    r"\sqrt{x+\sqrt{x+\sqrt{x+\sqrt{x+\sqrt{x+\sqrt{x+\sqrt{x}}}}}}}",
    "+".join(f"\\sin({i}x)\\cos({i + 1}y)" for i in range(200)),
    r"\sin(x)^{200}+\cos(x)^{200}-\tan(x)^{100}\sec(x)^{99}",
    "x = " * 2000 + "7",
    "<".join(f"x_{{{i}}}" for i in range(500)),
    r"x^{5}-x-1=0, y^{7}+xy+1=0, z^{9}-xyz=3",
    r"x^{30}+x^{29}y^{3}+\sin(xy)=\sqrt{x}+\log(x+y)",
]
NESTED = [
    r"\sqrt{" * 800 + "7" + "}" * 800,
    r"\frac{1}{1+" * 700 + "7" + "}" * 700,
    r"\left(" * 800 + "7" + r"\right)" * 800,
    "{" * 5000 + "7" + "}" * 5000,
    "x^{" * 2000 + "7" + "}" * 2000,
    "|" * 4000 + "7" + "|" * 4000,
    r"\lfloor" * 900 + "7",
    r"\boxed{" * 1500 + "8" + "}" * 1500,
    r"\text{" * 2000 + "8" + "}" * 2000,
    r"\begin{pmatrix}" * 500 + "1" + r"\end{pmatrix}" * 500,
    r"\det\begin{pmatrix}"
    + r"\\".join("&".join(f"x_{{{i}{j}}}" for j in range(9)) for i in range(9))
    + r"\end{pmatrix}",
    r"\begin{pmatrix}"
    + r"\\".join("&".join(str(i * j % 7 + 1) for j in range(40)) for i in range(40))
    + r"\end{pmatrix}^{-1}",
    r"\begin{pmatrix}1 & 1 \\ 1 & 0\end{pmatrix}^{10^{9}}",
]
CODE = [
    "__import__('os').system('touch /tmp/r1jax_was_here')",
    r"\text{__import__('os').system('touch /tmp/r1jax_was_here')}",
    r"\operatorname{__import__}(os).system(1)",
    "().__class__.__bases__[0].__subclasses__()",
    "eval('7')",
    "exec('x=7')",
    "open('/tmp/r1jax_was_here','w')",
    "(lambda: 7)()",
    "[7 for _ in iter(int, 1)]",
    "7 if True else 8",
    "'7'*10**9",
    "print(7)",
    "sympify('7')",
    "Integer(7)",
    "{{7}}",
    "{0.__class__}",
    "%s%s%n",
    r"\input{/etc/passwd}",
    r"\def\x{\x\x}\x",
    r"\write18{id}",
]
DIGITS = [
    "٧",
    "７",
    "७",
    "⁷",
    "₇",
    "Ⅶ",
    "⑦",
    "七",
    "𝟕",
    "7\u200b8",
    "\u202e7\u202c0",
    "7\u0301",
    "−8",
]
BYTES = ["\x00", "7\x008", "\ud800", "\udfff7", "\ufeff", "\x1b[31m", "\r\r\r", "\u2028" * 3000]
MANY_SIGNS = ["$", r"\(", r"\[", "answer ", "answer: ", "=", "1,", "final answer is ", r"\$", "$$ "]
MEGABYTE = 1_000_000


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def huge() -> list[str]:
    """A megabyte of one thing: refused unread, or found by one pass."""
    runs = ["9", "{", "}", " ", "$", "\n", "\\", "(", "汉", "a b "]
    texts = [run * (MEGABYTE // len(run)) for run in runs]
    return [
        *texts,
        *(boxed(text) for text in texts),
        r"\boxed{8} " * (MEGABYTE // 10),
        r"\boxed{7} " * (MEGABYTE // 10) + boxed("8"),
        r"\boxed{" * (MEGABYTE // 7),
        "#### " * (MEGABYTE // 5),
        "\n#### 8" * (MEGABYTE // 7),
        "\nA:" * (MEGABYTE // 3),
        "</think>" * (MEGABYTE // 8),
    ]


def entries() -> list[tuple[str, str]]:
    """(completion, reference) pairs. All are wrong answers, or are to be counted as wrong."""
    formulas = itertools.chain(POWERS, SERIES, SETS, SYMBOLS, NESTED, DIGITS, BYTES)
    pairs = [(boxed(text), "7") for text in formulas]
    pairs += [(boxed(text), "71") for text in CODE]  # 7 is what some of them say
    pairs += [(f"The answer is ${text}$.", "7") for text in (*POWERS, *SERIES)]
    pairs += [(text, "7.5") for text in (*PLAIN, *CODE)]
    pairs += [(f"#### {text}", "7.5") for text in PLAIN]
    pairs += [(boxed(text), "x^{2}+1") for text in SYMBOLS]
    pairs += [(boxed(text), r"(0,1)\cup(2,3)") for text in SETS]
    pairs += [(boxed(SETS[0].replace("0", "1", 1)), SETS[0])]
    pairs += [((sign * 19_000)[:19_000], "7") for sign in MANY_SIGNS]
    pairs += [(text, "7") for text in huge()]
    pairs += [
        (text, "7") for text in ("", " ", r"\boxed{}", r"\boxed{ }", "####", "#### ", r"\boxed")
    ]
    pairs += [(boxed("7, 8"), "7"), (boxed("7") + boxed("8"), "7"), (boxed("7 or 8"), "7")]
    return pairs
