"""The environment of every process a run starts; libraries read it when they are loaded."""

from importlib.util import find_spec

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""glibc gives every tensor above 32 MB back to the system when it is freed, and the next one is paged in and zeroed
again: on a 135M model 300,000 page faults in each learner step. A process keeps its peak instead."""

VLLM = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
"""Of a process that holds a vLLM engine; the engine runs in that process and not in one of its own."""
if find_spec("flashinfer") is None:  # vLLM 0.26 imports it on a GPU whenever a sampler is made
    VLLM |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}

VLLM_ON_CPU = VLLM | {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles a logprob helper even in eager mode: 3 s warm, 20 s on a fresh machine.
    "TORCHDYNAMO_DISABLE": "1",
}

CUDA = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
"""On compute capability 9 torch puts cuDNN's attention first, which builds a plan for each new shape of a batch: 1 to 3
s, most of a step where every step has new ones."""

ACTORS = QUIET | KEEP_MEMORY | CUDA


def of_threads(threads: int, *, cpus: float, overlap: bool) -> dict[str, str]:
    """How many threads a process has, and how they wait for each other where it shares its cores.

    OpenMP threads spin before they sleep. Never to spin costs a fifth of a step; to spin as long as OpenMP likes takes
    the cores from the other actors. So processes that take turns (lag 0) spin for a tenth of a millisecond, and those
    that work at the same time do not.

    Args:
        threads: of the process.
        cpus: logical CPUs it asked for; with fewer than ``threads`` it shares cores.
        overlap: whether generation, scoring and learning happen at the same time.
    """
    own = {"OMP_NUM_THREADS": str(threads)}
    if threads <= max(1.0, cpus):
        return own
    return own | ({"OMP_WAIT_POLICY": "PASSIVE"} if overlap else {"GOMP_SPINCOUNT": "10000"})
