"""How the program score starts its processes."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from glintru_rec.programs import score as program
from launch.score import py


class TestThreads:
    """Without the variable torchrun gives every rank one thread."""

    def threads(self, nproc):
        (role,) = py("artifact=a", nproc=nproc).roles
        return role.env.get("OMP_NUM_THREADS")

    def test_ranks_share_the_cores(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(11)), raising=False)
        assert [self.threads(nproc) for nproc in (1, 2, 4, 12)] == [None, "5", "2", "1"]

    def test_the_users_own_number_wins(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert self.threads(2) == "3"


def test_ranks_wait_for_the_slowest_for_days(monkeypatch):
    """Under torchrun; a rank's files may take hours longer than another's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for key, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(key, str(value))
    timeouts = []

    def look(config):
        timeouts.append(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout)

    monkeypatch.setattr(program, "_run", look)
    program.score_program(None)
    assert timeouts[0] >= timedelta(days=7)
