"""Fetch MovieLens 100K, a small real log to try the programs on.

    python tools/fetch_ml100k.py DEST

writes ``DEST/ml-100k/ml-100k.inter`` and the files beside it, in RecBole's format: 100,000 ratings of 943 users.
They come out of the RecBole package, which pip downloads but does not install. A second call finds them and does nothing.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "recbole==1.2.1"
_FOLDER = "recbole/dataset_example/ml-100k/"
_LOG = "ml-100k.inter"
_LOG_SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"


def fetch(destination: Path) -> Path:
    """Put the data set at ``destination/ml-100k``, whole or not at all.

    Returns:
        The path of the log.

    Raises:
        SystemExit: the package cannot be downloaded, does not hold the data, or holds other data than expected.
    """
    folder = destination / "ml-100k"
    if _is_whole(folder):
        return folder / _LOG
    if folder.exists():
        sys.exit(f"{str(folder)!r} exists but its {_LOG} is missing or differs; remove the folder and run again")
    destination.mkdir(parents=True, exist_ok=True)
    # Inside the destination, so that the last step is a rename and not a copy.
    with tempfile.TemporaryDirectory(prefix=".ml-100k-", dir=destination) as work:
        wheel = _download(Path(work))
        unpacked = Path(work) / "ml-100k"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(_FOLDER) and not name.endswith("/"):
                    with archive.open(name) as source, (unpacked / Path(name).name).open("wb") as target:
                        shutil.copyfileobj(source, target)
        if not _is_whole(unpacked):
            sys.exit(f"{_PACKAGE} holds no {_LOG} with sha256 {_LOG_SHA256}; nothing was written")
        os.replace(unpacked, folder)
    return folder / _LOG


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", _PACKAGE, "-d", str(work)]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        sys.exit(
            f"pip could not download {_PACKAGE}; check that it can reach a package index. It said:\n{result.stderr.strip()}"
        )
    return wheels[0]


def _is_whole(folder: Path) -> bool:
    log = folder / _LOG
    return log.is_file() and hashlib.sha256(log.read_bytes()).hexdigest() == _LOG_SHA256


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fetch MovieLens 100K in RecBole's format.")
    parser.add_argument("destination", type=Path, help="the folder to put ml-100k/ into")
    print(fetch(parser.parse_args().destination))
