# SPDX-License-Identifier: Apache-2.0
"""Who takes part in a run, and what a process answers that is alone."""

import socket

import numpy as np
import pytest

from r1jax.parallel import hosts

LAUNCH = hosts.Launch("a:1", 4, 3)
ASKED = hosts.Launch(None, None, None)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(
    ("flags", "environ", "launch"),
    [
        ((None, None, None), {}, None),
        (("a:1", 4, 3), {}, LAUNCH),
        (("a:1", 1, 0), {}, None),
        ((None, None, None), SLURM, ASKED),
        # A shell of a job, or a pod of Kubernetes, does not say that others run the same.
        ((None, None, None), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),
        ((None, None, None), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ((None, None, None), {"KUBERNETES_SERVICE_HOST": "h"}, None),
        (("auto", None, None), {"KUBERNETES_SERVICE_HOST": "h"}, ASKED),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "2"}, ASKED),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, ASKED),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ((None, None, None), {"MEGASCALE_NUM_SLICES": "2"}, ASKED),
        (("none", None, None), SLURM, None),
        (("a:1", 4, 3), SLURM, LAUNCH),
    ],
)
def test_who_takes_part(flags, environ, launch):
    assert hosts.launched(*flags, environ=environ) == launch


def test_variables_stand_in_for_flags():
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    environ = dict(zip(names, ("a:1", "4", "0"), strict=True))
    assert hosts.launched(None, None, 3, environ=environ) == LAUNCH
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='x' must be a number"):
        hosts.launched(None, None, None, environ=environ | {"JAX_PROCESS_ID": "x"})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((None, None, 0), "go together, got None, None, 0"),
        (("a:1", None, 0), "go together, got 'a:1', None, 0"),
        (("a:1", 4, 4), r"^process must lie in 0\.\.3, got 4"),
        (("a:1", 4, -1), r"^process must lie in 0\.\.3, got -1"),
        (("a:1", 0, 0), "^processes must be 1 or more, got 0"),
        (("a", 4, 0), "coordinator must be HOST:PORT, got 'a'"),
        ((":1", 4, 0), "coordinator must be HOST:PORT, got ':1'"),
        (("a:0", 4, 0), "coordinator must be HOST:PORT, got 'a:0'"),
        (("a:65536", 4, 0), "coordinator must be HOST:PORT, got 'a:65536'"),
        (("auto", 2, None), "are not given where the environment knows them"),
    ],
)
def test_half_of_it_is_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        hosts.launched(*flags, environ={})


def test_a_port_that_is_taken_is_refused():
    """The runtime would crash, or share it with the other run."""
    with socket.create_server(("", 0)) as other:
        where = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"coordinator={where}: process 0 cannot listen"):
            hosts.start(hosts.Launch(where, 2, 0))


def test_alone_everything_answers_at_once():
    def wrong():
        raise ValueError("no")

    assert hosts.exchanged({"a": 1}) == [{"a": 1}]
    assert hosts.by_first(lambda: 3) == 3
    with pytest.raises(ValueError, match="no"):
        hosts.by_first(wrong)
    hosts.check_same([1], "it")
    rows = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(hosts.own_rows(rows), np.arange(4))
    np.testing.assert_array_equal(hosts.local_rows(rows, np.array([2, 0])), rows[[2, 0]])


class Shard:
    """A part of an array, as an array of several processes has them."""

    def __init__(self, rows, replica_id):
        self.index, self.replica_id = (rows, slice(None)), replica_id


def test_each_row_is_of_one_process(monkeypatch):
    """Rows of replica 0 alone, in whatever order devices hold them."""

    class Array:
        is_fully_addressable = False
        addressable_shards = (Shard(slice(6, 8), 0), Shard(slice(0, 2), 0), Shard(slice(2, 4), 1))

        def __len__(self):
            return 8

    monkeypatch.setattr(hosts.jax, "Array", Array)
    np.testing.assert_array_equal(hosts.own_rows(Array()), [0, 1, 6, 7])
    monkeypatch.setattr(Array, "addressable_shards", (Shard(slice(0, 8), 1),))
    assert len(hosts.own_rows(Array())) == 0
