"""What is in a cache: python examples/read_cache.py CACHE TEACHER (a language model's name)."""

import sys

from rekindle.data.cache import Cache


def main(place: str, teacher: str) -> None:
    cache = Cache.open(place)
    print(cache)  # sequences, tokens, and of each teacher what is kept, its bytes, whether complete

    example = cache.example(0)  # one sequence, in words
    print(f"\n{example.text[:300]}\n")
    target = example.targets[teacher][0]  # of its first masking: [P] positions, [P,K] candidates
    for position, ids, log_probs in zip(
        target.positions[:5], target.ids[:5], target.log_probs[:5], strict=True
    ):
        print(f"position {position}: ids {ids[:4]}, log-probabilities {log_probs[:4].round(2)}")

    hardest = cache.ranking(teacher, "mean_loss")[:3]  # from stored numbers, no model is run
    print("\nwhat the teacher found hardest:")
    for index in hardest:
        print(f"  {cache.texts[int(index)][:100]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
