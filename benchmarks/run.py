"""Run the benchmarks, and write what they found into docs/: see ``nox -s bench``."""

import argparse
import asyncio
from pathlib import Path

import load
from processes import Environments

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--pythons", nargs="+", default=["3.11", "3.13"])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    import json
    print(json.dumps(asyncio.run(load.main(Environments(args.environments), args.pythons, args.quick))))
