"""Write the histories of a dataset with original ids, as `launch/score.py` reads them.

python tools/write_histories.py DATASET OUTPUT.parquet --split all
"""

import argparse
import sys
from pathlib import Path

from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.side_features import SideVocabulary
from glintru_rec.errors import InputError
from glintru_rec.files import check_writable


def main() -> int:
    """Read the command line, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a dataset made by launch/prepare.py")
    parser.add_argument("output", help="parquet file to write: user_id, history, side features, and target of a split")
    parser.add_argument(
        "--split",
        choices=("all", "valid", "test"),
        default="test",
        help="all: every user's whole history, to recommend what comes next; test (default): all but the last item, which is "
        "the target; valid: all but the last two",
    )
    arguments = parser.parse_args()
    try:
        check_writable(Path(arguments.output))
        side_features = SideVocabulary.load(arguments.dataset).names
        SequenceDataset.open(arguments.dataset, side_features).write_histories(arguments.output, arguments.split)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
