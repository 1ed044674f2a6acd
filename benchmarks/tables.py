"""
The tables of benchmarks/README.md, from the files that benchmarks write.

    python benchmarks/tables.py loss.json step.json
    python benchmarks/tables.py gpu_results/results.json            # of `make gpu`
    python benchmarks/tables.py machine1/step.json machine2/step.json

Runs of the same command, on several machines or at several times, are followed by the range of their median ratios.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from results import range_table, with_heading


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """What benchmarks have written, in the order of the files."""
    found = []
    for path in paths:
        content = json.loads(path.read_text())
        results = [step.get("result", {}) for step in content["steps"]] if "steps" in content else [content]
        found += [result for result in results if "benchmark" in result]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    runs: dict[str, list[dict[str, Any]]] = {}
    for result in read(parser.parse_args().files):
        runs.setdefault(result["command"], []).append(result)
    for command, results in runs.items():
        print(*(with_heading(result) for result in results), sep="\n\n", end="\n\n")
        if len(results) > 1 and results[0]["candidates"]:
            print(f"Range over {len(results)} runs of `{command}`:\n\n{range_table(results)}", end="\n\n")


if __name__ == "__main__":
    main()
