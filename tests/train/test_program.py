# SPDX-License-Identifier: Apache-2.0
"""Programs compile ahead of their first call, once."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.train.program import Ahead, program


@pytest.fixture
def compilations():
    """Grows by one with every compilation."""
    seen = []

    def listen(event, _seconds, **_):
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_call_after_the_thread_compiles_nothing(compilations):
    fn = program(lambda tree, *, scale: jnp.tanh(tree["x"]) * scale, donate_argnums=0)
    x = jax.device_put(np.arange(6, dtype=np.float32))
    scale = np.float32(2)
    compiling = Ahead(fn, {"x": jax.ShapeDtypeStruct((6,), np.float32)}, scale=scale)
    assert compiling.shapes == jax.ShapeDtypeStruct((6,), np.float32)
    assert not compilations
    compiling.start().join()
    assert len(compilations) == 1
    np.testing.assert_allclose(fn({"x": x}, scale=scale), np.tanh(np.arange(6.0)) * 2, rtol=1e-6)
    assert len(compilations) == 1


FAILING = """
import atexit, sys
import jax.numpy as jnp
from r1jax.cli import command
from r1jax.train import program as program_module
from r1jax.train.program import Ahead, program

def long(x):
    for i in range(40):
        x = jnp.sin(x[::-1] * i) @ jnp.cos(x + i)
    return x

compiling = Ahead(program(long), jnp.ones((8, 8))).start()
assert program_module.compiling()
atexit.register(print, "in order")
"""


@pytest.mark.parametrize(
    ("end", "says"),
    [
        pytest.param("sys.exit(2)", "in order\n", marks=pytest.mark.slow),
        # The console does not wait.
        ("command.main = lambda: 2; print('failed'); sys.exit(command.console())", "failed\n"),
    ],
)
def test_an_error_while_it_compiles_ends_the_process(end, says):
    command = [sys.executable, "-c", FAILING + end, "info"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, says), done.stderr


def test_what_cannot_be_traced_fails_at_once():
    with pytest.raises(TypeError, match="dot_general"):
        Ahead(program(lambda x: x @ x), np.ones((2, 3)))


def test_a_level_in_the_flags_stands(monkeypatch):
    options = {}
    monkeypatch.setattr(
        jax, "jit", lambda fn, *, compiler_options: options.update(o=compiler_options)
    )
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    program(abs)
    assert options == {"o": None}
    monkeypatch.setenv("XLA_FLAGS", "")
    program(abs)
    assert options == {"o": {"xla_backend_optimization_level": 1}}
