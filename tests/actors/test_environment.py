"""The environment of the processes of a run: how their threads wait for each other, and what vLLM must not look for."""

from importlib.util import find_spec

from r3hf_ray.actors.environment import VLLM, VLLM_ON_CPU, of_threads


def test_vllm_does_not_look_for_a_sampler_that_is_not_installed() -> None:
    expected = None if find_spec("flashinfer") else "0"
    assert VLLM.get("VLLM_USE_FLASHINFER_SAMPLER") == VLLM_ON_CPU.get("VLLM_USE_FLASHINFER_SAMPLER") == expected


def test_only_processes_that_share_cores_are_told_how_to_wait() -> None:
    assert of_threads(1, cpus=0.3, overlap=False) == {"OMP_NUM_THREADS": "1"}
    assert of_threads(8, cpus=8.0, overlap=True) == {"OMP_NUM_THREADS": "8"}
    assert of_threads(2, cpus=0.3, overlap=False) == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "10000"}
    assert of_threads(2, cpus=1.0, overlap=True) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
