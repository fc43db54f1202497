"""One benchmark: bare loops and every variant of the system in turn, several times over, then the tables."""

import os
import platform
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from bench.bare import BareLoops
from bench.results import BareStep, Results, SystemRun, bare_sum, targets
from bench.shapes import LAG_0, Shape, make_inputs
from bench.system import clean_environment, run_system
from bench.table import as_json, page, show
from r3hf_ray.instruments.pages.writing import write_page
from r3hf_ray.records.provenance import versions

CORES = 2
BUSY_SHARE = 0.25
"""Load average a core above which the numbers mean little."""


def benchmark(
    shape: Shape, *, repeats: int, steps: int | None, folder: Path, model: Path, command: str, console: Console
) -> Path:
    """Measure a shape; write `bench.html`, `.md`, `.json` and the runs' records below a new folder, which is returned.

    Everything runs on the same two cores. Repeats are interleaved and the variants rotate, so that a machine that
    slows down slows all of them.

    Raises:
        ConfigError: SmolLM2's folder is not there.
        RunFailed: a run or a bare loop failed.
    """
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)  # children inherit it
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing of it is left running
    load = os.getloadavg()[0]
    if load > BUSY_SHARE * (os.cpu_count() or 1):
        console.print(f"warning: the machine is busy (load average {load:.1f}); the numbers will mean little")
    started = time.time()
    root = (folder / f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{shape.name}").resolve()
    (root / "bare").mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="r3hf-bench-") as inputs:
        console.print(f"writing models and prompts ({shape.name})")
        make_inputs(shape, Path(inputs), model=model)
        results = _measure(shape, repeats, steps or shape.steps, Path(inputs), root, len(cores), console)
    facts = _facts(command, started, repeats=repeats, load=load, cores=len(cores))
    write_page(root, "bench", page(results, facts), as_json(results, facts))
    show(results, console)
    for target in targets(results):
        if not target.met:
            console.print(f"missed: {target.what} is {target.measured}, wanted {target.wanted}")
    console.print(f"results: {root / 'bench.md'}")
    return root


def _measure(shape: Shape, repeats: int, steps: int, inputs: Path, root: Path, cores: int, console: Console) -> Results:
    environment = clean_environment()
    bare: list[BareStep] = []
    systems: dict[str, list[SystemRun]] = {variant.name: [] for variant in shape.variants}
    first = shape.config(LAG_0, inputs=inputs, folder=root, name="bare", steps=steps)
    for repeat in range(repeats):
        console.print("starting the bare loops")
        # Ended before the system runs: idle, they would hold the memory that a run needs.
        with BareLoops(first, cores=cores, logs=root / "bare") as loops:
            for threads in sorted({1, cores}):
                bare += [loops.step(threads=threads) for _ in range(shape.iterations)]
        console.print(f"repeat {repeat + 1}: bare loops {bare_sum(bare).wall:.2f} s a step")
        turn = repeat % len(shape.variants)
        for variant in (*shape.variants[turn:], *shape.variants[:turn]):
            if variant.once and repeat:
                continue
            name = f"{variant.name.replace(' ', '-')}-{repeat + 1}"
            config = shape.config(variant, inputs=inputs, folder=root / "runs", name=name, steps=steps)
            run = run_system(config, environment=environment, cores=cores)
            systems[variant.name].append(run)
            every = ", ".join(f"{second:.2f}" for second in run.steps)
            console.print(f"repeat {repeat + 1}: {variant.name}: first step {run.first_step:.0f} s, then {every} s")
    return Results(shape=shape.name, overhead=shape.overhead, bare=bare, systems=systems)


def _facts(command: str, started: float, *, repeats: int, load: float, cores: int) -> Mapping[str, str]:
    return {
        "command": f"`{command}`",
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(started)) + " UTC",
        "took": f"{time.time() - started:.0f} s",
        "repeats": str(repeats),
        "machine": f"{cores} cores of {_processor()}, load average {load:.1f} at the start",
        **versions(),
    }


def _processor() -> str:
    """The CPU's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
