"""How the threads of a process wait for each other."""

from r3hf_ray.actors.environment import of_threads


def test_only_processes_that_share_cores_are_told_how_to_wait() -> None:
    assert of_threads(1, cpus=0.3, overlap=False) == {"OMP_NUM_THREADS": "1"}
    assert of_threads(8, cpus=8.0, overlap=True) == {"OMP_NUM_THREADS": "8"}
    assert of_threads(2, cpus=0.3, overlap=False) == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "10000"}
    assert of_threads(2, cpus=1.0, overlap=True) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
