"""`python -m bench` in `tests/`: what `make bench` runs."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.run import benchmark
from bench.shapes import SHAPES
from r3hf_ray.errors import ConfigError, RunFailed


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description="the system against bare loops of the same work")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny", help="0.9M or 135M parameters")
    parser.add_argument("--repeats", type=int, default=3, help="of everything, interleaved (default: 3)")
    parser.add_argument("--steps", type=int, help="PPO steps of one run of the system (default: the shape's)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where results are kept (default: runs)")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"), help="SmolLM2's folder")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    try:
        benchmark(
            SHAPES[options.shape],
            repeats=options.repeats,
            steps=options.steps,
            folder=options.folder,
            model=options.model,
            command=" ".join(["make bench", f"ARGS='{' '.join(sys.argv[1:])}'"]),
            console=console,
        )
    except (ConfigError, RunFailed) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
