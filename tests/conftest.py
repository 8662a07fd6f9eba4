# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test, one hypothesis profile, programs forgotten in time."""

import importlib.metadata
import os

# All must be set before the first `import jax`. On real chips: JAX_PLATFORMS=tpu,cpu pytest -m tpu
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: level 0 halves the compilations, and so do the emitters of
# old where XLA still has them (the tests of the newest JAX run those that replaced them).
_flags = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _flags["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _flags.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
# As `r1jax.cli.pages` says, for the workers and the commands that tests start: an eighth faster.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

import hypothesis  # noqa: E402  (after the environment is set)
import jax  # noqa: E402
import pytest  # noqa: E402

# No deadline: the first example of a jitted function compiles. Derandomised: red is red again.
hypothesis.settings.register_profile(
    "r1jax",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("r1jax")


def pytest_configure(config):
    """Compiled programs, small ones too, are kept in pytest's own cache: the next module and the
    next run of the same tests, and the commands that tests start, find them there.
    `--cache-clear` forgets them."""
    if not config.pluginmanager.hasplugin("cacheprovider"):  # -p no:cacheprovider
        return
    folder = str(config.cache.mkdir("jax"))
    for name, value in (
        ("jax_compilation_cache_dir", folder),
        ("jax_persistent_cache_min_compile_time_secs", 0),
    ):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True, scope="module")
def _programs_forgotten():
    """A program on CPU keeps some ten memory maps; a process may have 65,530 and dies of more."""
    yield
    jax.clear_caches()
