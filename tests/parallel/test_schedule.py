# SPDX-License-Identifier: Apache-2.0
"""The time of a schedule against hand-computed ones: what hides a collective and what waits."""

import pytest

from r1jax.parallel.costs import Rules, half
from r1jax.parallel.hlo import parse
from r1jax.parallel.roofline import Spot
from r1jax.parallel.schedule import scheduled
from r1jax.parallel.topology import Chip

# One dot of 1024³ takes 2.147 s of arithmetic; a MiB of bfloat16 reads and writes next to nothing.
CHIP = Chip(1e9, 1e9, 2e9, 1e15, 1e6, 1e6, 1)
WHERE = [Spot(0, (x,)) for x in range(4)]
DOT = 2 * 1024**3 / 1e9
GATHER = 3 * 2 * 1024 * 256 / 2e6  # three times [1024, 256] bfloat16 over both directions of a ring
RULES = Rules(4, half)

HEAD = """HloModule step, is_scheduled=true

"""
BEGIN = """  %s = (bf16[1024,256], bf16[1024,1024]) all-gather-start(%w), dimensions={1}, \
replica_groups={{0,1,2,3}}
"""
DONE = """  %g = bf16[1024,1024] all-gather-done(%s)
"""
PRODUCT = """  %{0} = bf16[1024,1024] dot(%{1}, %{2}), lhs_contracting_dims={{1}}, \
rhs_contracting_dims={{0}}
"""


def entry(*lines):
    return (
        "ENTRY %main (x: bf16[1024,1024], w: bf16[1024,256]) -> bf16[1024,1024] {\n"
        "  %x = bf16[1024,1024] parameter(0)\n"
        "  %w = bf16[1024,256] parameter(1)\n" + "".join(lines) + "}\n"
    )


def run(text, rules=RULES):
    return scheduled(parse(HEAD + text), rules, CHIP, WHERE)


def product(name, left, right):
    return PRODUCT.format(name, left, right)


def check(found, seconds, waited):
    assert found.seconds == pytest.approx(seconds, rel=1e-4)
    assert found.moved == {"all-gather": pytest.approx(GATHER, rel=1e-6)}
    assert found.waited == {"all-gather": pytest.approx(waited, rel=1e-4)}


def test_what_stands_between_hides_it():
    """The gather takes 0.786 s, the product beside it 2.147 s."""
    assert 0 < GATHER < DOT
    check(run(entry(BEGIN, product("a", "x", "x"), DONE, product("b", "a", "g"))), 2 * DOT, 0.0)


def test_a_wait_at_once_hides_nothing():
    check(
        run(entry(BEGIN, DONE, product("a", "x", "x"), product("b", "a", "g"))),
        GATHER + 2 * DOT,
        GATHER,
    )


def test_a_synchronous_one_is_waited_for():
    sync = (BEGIN + DONE).replace("all-gather-start", "all-gather").splitlines()[0]
    sync = sync.replace("%s = (bf16[1024,256], bf16[1024,1024])", "%g = bf16[1024,1024]") + "\n"
    check(
        run(entry(product("a", "x", "x"), sync, product("b", "a", "g"))), GATHER + 2 * DOT, GATHER
    )


def test_links_carry_one_after_another():
    """Both are begun at once; the product hides the first and most of the second."""
    second = BEGIN.replace("%s", "%r"), DONE.replace("%s", "%r").replace("%g", "%h")
    third = BEGIN.replace("%s", "%q"), DONE.replace("%s", "%q").replace("%g", "%i")
    lines = BEGIN, second[0], third[0], product("a", "x", "x"), DONE, second[1], third[1]
    found = run(entry(*lines, product("b", "a", "i")))
    assert found.moved["all-gather"] == pytest.approx(3 * GATHER)
    assert found.seconds == pytest.approx(3 * GATHER + DOT, rel=1e-4)
    assert found.waited["all-gather"] == pytest.approx(3 * GATHER - DOT, rel=1e-4)


WRAPPED = """%wrapped (p: bf16[1024,256]) -> bf16[1024,1024] {
  %p = bf16[1024,256] parameter(0)
  ROOT %inner = bf16[1024,1024] all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={1}
}

"""


def test_what_is_wrapped_is_begun_by_async_start():
    begin = "  %s = ((bf16[1024,256]), bf16[1024,1024]) async-start(%w), calls=%wrapped\n"
    done = "  %g = bf16[1024,1024] async-done(%s)\n"
    lines = begin, product("a", "x", "x"), done, product("b", "a", "g")
    check(run(WRAPPED + entry(*lines)), 2 * DOT, 0.0)
    check(run(WRAPPED + entry(begin, done, *lines[1::2])), 2 * DOT + GATHER, GATHER)


def test_what_gets_its_operands_later_begins_then():
    """A sparse core is told early what to do: between that and its operands nothing is moved."""
    begin = "  %s = ((), ()) async-start(), calls=%wrapped\n"
    given = "  %u = ((bf16[1024,256]), bf16[1024,1024]) async-update(%s, %w)\n"
    done = "  %g = bf16[1024,1024] async-done(%u)\n"
    first, last = product("a", "x", "x"), product("b", "a", "g")
    check(run(WRAPPED + entry(begin, first, given, done, last)), 2 * DOT + GATHER, GATHER)
    check(run(WRAPPED + entry(begin, given, first, done, last)), 2 * DOT, 0.0)


LOOP = """%body (t: (s32[])) -> (s32[]) {
  %t = (s32[], bf16[1024,1024], bf16[1024,256]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  %x = bf16[1024,1024] get-tuple-element(%t), index=1
  %w = bf16[1024,256] get-tuple-element(%t), index=2
BODY  ROOT %o = (s32[], bf16[1024,1024], bf16[1024,256]) tuple(%j, %b, %w)
}

%test (t: (s32[], bf16[1024,1024], bf16[1024,256])) -> pred[] {
  %t = (s32[], bf16[1024,1024], bf16[1024,256]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(5)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

"""
WHILE = """  %zero = s32[] constant(0)
  %t = (s32[], bf16[1024,1024], bf16[1024,256]) tuple(%zero, %x, %w)
  %l = (s32[], bf16[1024,1024], bf16[1024,256]) while(%t), condition=%test, body=%body
  %y = bf16[1024,1024] get-tuple-element(%l), index=1
"""


def test_the_turns_of_a_loop():
    """Five turns of a product that hides a gather, and of one that does not."""
    hidden = BEGIN + product("a", "x", "x") + DONE + product("b", "a", "g")
    exposed = BEGIN + DONE + product("a", "x", "x") + product("b", "a", "g")
    for body, waited in ((hidden, 0.0), (exposed, GATHER)):
        found = run(LOOP.replace("BODY", body) + entry(WHILE))
        assert found.seconds == pytest.approx(5 * (2 * DOT + waited), rel=1e-4)
        assert found.moved["all-gather"] == pytest.approx(5 * GATHER)
        assert found.waited["all-gather"] == pytest.approx(5 * waited, rel=1e-4)


def test_a_loop_hides_what_was_begun_before_it():
    """Two turns would; its own gathers go over the same links, and hold the first one up."""
    plain = product("a", "x", "x") + product("b", "a", "x")
    last = product("z", "y", "g")
    lines = BEGIN, WHILE, DONE, last
    found = run(LOOP.replace("BODY", plain) + entry(*lines))
    assert found.seconds == pytest.approx(11 * DOT, rel=1e-4)
    assert found.waited["all-gather"] == pytest.approx(0.0, abs=1e-6)
    busy = BEGIN + DONE + product("b", "x", "g")
    found = run(LOOP.replace("BODY", busy) + entry(*lines))
    assert found.seconds == pytest.approx(6 * DOT + 5 * GATHER, rel=1e-4)


def test_what_a_loop_sends_holds_up_what_was_begun_before_it():
    """Five gathers with no arithmetic leave the sixth, begun first, to be waited for."""
    body = BEGIN + DONE + "  %b = bf16[1024,1024] add(%x, %g)\n"
    found = run(LOOP.replace("BODY", body) + entry(BEGIN, WHILE, DONE, product("z", "y", "g")))
    assert found.seconds == pytest.approx(6 * GATHER + DOT, rel=1e-4)
    assert found.waited["all-gather"] == pytest.approx(6 * GATHER, rel=1e-4)


def test_memory_is_waited_for_but_not_as_a_collective():
    slow = CHIP._replace(memory=1e6)
    text = entry(product("a", "x", "x"), product("b", "a", "a"))
    found = scheduled(parse(HEAD + text), RULES, slow, WHERE)
    read = 2 * 1024 * 1024 * 3 / 1e6
    assert read > DOT
    assert found.seconds == pytest.approx(2 * read)
    assert found.waited == {}
    # A gather whose result takes longer to write than to send is waited for as long as it sends.
    lines = BEGIN, DONE, product("b", "x", "g")
    found = scheduled(parse(HEAD + entry(*lines)), RULES, slow, WHERE)
    moved = 2 * 1024 * (256 + 1024) / 1e6
    assert moved > GATHER
    assert found.seconds == pytest.approx(moved + read)
    assert found.waited["all-gather"] == pytest.approx(GATHER)


def test_a_sparse_core_moves_memory_when_it_gets_its_operands():
    """A gather of 1,024 rows, which the product hides; without operands it moves nothing."""
    slow = CHIP._replace(memory=5e6)
    begin = "  %s = ((), ()) custom-call-start()\n"
    given = (
        "  %u = ((bf16[1024,1024], s32[1024]), bf16[1024,1024], s32[32768]) "
        "custom-call-update(%s, %x, %n)\n"
    )
    done = "  %g = bf16[1024,1024] custom-call-done(%u)\n"
    number = "  %n = s32[1024] constant({...})\n"
    moved, read = (2 * 2 * 1024**2 + 4096) / 5e6, 3 * 2 * 1024**2 / 5e6
    first, last = product("a", "x", "x"), product("b", "a", "g")
    assert moved + read < DOT
    after, beside = (
        scheduled(parse(HEAD + entry(number, begin, *lines, done, last)), RULES, slow, WHERE)
        for lines in ((first, given), (given, first))
    )
    assert after.seconds == pytest.approx(2 * DOT + moved, rel=1e-4)
    assert beside.seconds == pytest.approx(2 * DOT, rel=1e-4)
    assert beside.busy[0] == pytest.approx(moved + 2 * read, rel=1e-4)
