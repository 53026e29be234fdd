"""tools/doctor.py: what it says of versions, and its real steps on this machine."""

import re
import subprocess
import sys
from runpy import run_path

import pytest

from tests.conftest import REPOSITORY, environment

TOOL = REPOSITORY / "tools" / "doctor.py"
doctor = run_path(str(TOOL))
Problem = doctor["Problem"]
GOOD = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": None, "fbgemm-gpu-cpu": "1.8.0"}


def test_versions_that_belong_together():
    assert doctor["check_stack"](GOOD).endswith("belong together")
    assert "triton 3.7.1 belongs" in doctor["check_triton"]("2.13.0", "3.7.1", True)
    assert "not needed" in doctor["check_triton"]("2.13.0+cpu", None, False)
    assert doctor["check_java"]("4.0.1", 'openjdk version "17.0.2" 2022') == "pyspark 4.0.1, Java 17"
    assert doctor["check_java"]("3.5.1", 'java version "1.8.0_301"') == "pyspark 3.5.1, Java 8"
    assert "not needed" in doctor["check_java"](None, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"torch": "2.12.0"}, "torch 2.12 needs fbgemm 1.7 and torchrec 1.7"),
        ({"torchrec": "1.7.0"}, "torch 2.13 needs fbgemm 1.8 and torchrec 1.8"),
        ({"torch": "3.0.0"}, "torch 2.11 or 2.12 or 2.13 is needed"),
        ({"fbgemm-gpu-cpu": None}, "exactly one of fbgemm-gpu and fbgemm-gpu-cpu"),
        ({"fbgemm-gpu": "1.8.0"}, "exactly one of fbgemm-gpu and fbgemm-gpu-cpu"),
        ({"torchrec": None}, "make setup"),
    ],
)
def test_versions_that_do_not(changed, message):
    with pytest.raises(Problem, match=re.escape(message)):
        doctor["check_stack"]({**GOOD, **changed})


def test_triton_and_java_that_do_not_fit():
    with pytest.raises(Problem, match=r"triton 3\.6\.0 with torch 2\.13\.0: pip install 'triton==3\.7"):
        doctor["check_triton"]("2.13.0", "3.6.0", True)
    with pytest.raises(Problem, match="the GPU kernels cannot run"):
        doctor["check_triton"]("2.13.0", None, True)
    with pytest.raises(Problem, match="needs Java 17 or newer, found none"):
        doctor["check_java"]("4.0.1", None)


def test_a_surprise_is_a_line_that_says_what_to_do(capsys):
    assert doctor["examine"]("cuda", lambda: 1 / 0) is False
    assert capsys.readouterr().out.startswith("TO DO cuda      ZeroDivisionError: division by zero")


@pytest.mark.programs
def test_this_machine():
    """Training on two ranks and the export are real; torch.compile has tests of its own, and takes long."""
    command = [sys.executable, str(TOOL), "--no-compile"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment())
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert " ".join(line.split()[1] for line in lines) == "python stack imports cuda devices triton java training export"
    assert all(line.startswith("ok ") for line in lines)
    assert "steps on 2 gloo rank(s), the item table sharded by rows" in result.stdout
