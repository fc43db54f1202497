"""The environment of every process a run starts; libraries read it when they are loaded."""

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""glibc gives every tensor above 32 MB back to the system when it is freed, and the next one is paged in and zeroed
again: on a 135M model 300,000 page faults and a tenth of each learner step. A process keeps its peak instead."""

SHORT_SPIN = {"GOMP_SPINCOUNT": "10000"}
"""Threads of one process wait for each other's next piece of work a tenth of a millisecond before they sleep: never to
spin costs a fifth of a step, and to spin as long as OpenMP likes takes the cores from the other actors."""

VLLM = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
"""Of a process that holds a vLLM engine; the engine runs in that process and not in one of its own."""

VLLM_ON_CPU = VLLM | {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles a logprob helper even in eager mode: 3 s warm, 20 s on a fresh machine.
    "TORCHDYNAMO_DISABLE": "1",
}

ACTORS = QUIET | KEEP_MEMORY
"""Of actors and learner ranks; `SHORT_SPIN` is left to the user on a cluster."""
