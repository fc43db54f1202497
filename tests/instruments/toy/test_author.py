import random

from r3hf_ray.instruments.toy.author import noisy_response
from r3hf_ray.instruments.toy.language import EOS, gold_reward, make_request


def test_author_is_seeded_cut_at_the_limit_and_mediocre() -> None:
    def write(seed: int) -> list[tuple[str, str]]:
        rng = random.Random(seed)
        requests = [make_request(rng) for _ in range(1000)]
        return [(request.text, noisy_response(request, 48, rng)) for request in requests]

    texts = write(3)
    assert texts == write(3)
    lengths = [len(response.split()) for _, response in texts]
    finished = [response.endswith(EOS) for _, response in texts]
    assert max(lengths) == 48
    assert all(ended or length == 48 for ended, length in zip(finished, lengths, strict=True))
    assert 0.7 < sum(finished) / 1000 < 0.95
    assert 1.5 < sum(gold_reward(*text) for text in texts) / 1000 < 2.3  # of at most 11.5
