"""Files that programs are asked for: whether they can be written is known before the work for them begins."""

import subprocess
import sys
from pathlib import Path

import pytest

from glintru_rec.errors import InputError
from glintru_rec.files import check_writable
from tests.conftest import REPOSITORY, environment


def test_the_folder_is_made_and_a_file_that_is_there_stays(tmp_path):
    output = tmp_path / "new" / "folder" / "file"
    check_writable(output)
    assert list(output.parent.iterdir()) == []
    output.write_text("before")
    check_writable(output)
    assert (list(output.parent.iterdir()), output.read_text()) == ([output], "before")


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(InputError, match=rf"output={tmp_path} is a directory; give a file to write"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output=.*file/below cannot be written: .*\(.*file.*\)"):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(InputError, match=r"output=/proc/file cannot be written"):  # it takes no file, whoever asks
        check_writable(Path("/proc/file"))


@pytest.mark.parametrize("tool", ["write_histories", "report", "draw_curves"])
def test_tools_make_the_folder_and_refuse_one(tool, run_dir, dataset_dir, tmp_path):
    def called(output: Path) -> tuple[int, str]:
        arguments = [dataset_dir, output] if tool == "write_histories" else [run_dir, f"output={output}"]
        command = [sys.executable, *map(str, [REPOSITORY / "tools" / f"{tool}.py", *arguments])]
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment())
        return result.returncode, result.stderr

    output = tmp_path / "new" / "file.svg"
    assert called(output) == (0, "")
    assert output.stat().st_size
    status, said = called(tmp_path)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: output={tmp_path} is a directory")
