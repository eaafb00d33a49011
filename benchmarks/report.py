"""``python -m benchmarks.report out.json [--out DIR]``: Markdown table and plots of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from smis_models.benchmark.records import load, markdown, plots
from smis_models.io.images import write_atomically


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="written by pytest --benchmark-json")
    parser.add_argument("--out", type=Path, help="folder for the report; default: beside the JSON")
    arguments = parser.parse_args()
    try:
        records = load(arguments.json)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    folder = arguments.out or arguments.json.parent
    text = markdown(records)
    print(text)
    path = write_atomically(folder / f"{arguments.json.stem}.md", text.encode())
    for written in (path, *plots(records, folder)):
        print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
