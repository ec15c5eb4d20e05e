"""Five tasks one after the other: what a penalty, replay and a memory each keep of the first ones, and together.

Each task sees scikit-learn's digits through a permutation of its own, and nobody says which task an image belongs to.
Strengths were chosen with other random seeds (100, 101).
Run: python examples/learn_in_sequence.py
"""

import torch

from recollect import EpisodicMemory, LocalAdaptation, MbPA, gaussian, rules
from recollect.continual import EWC, MAS, Accuracies, Learner, Ring, run
from recollect.data import digits, permuted
from recollect.models import mlp


def learn(companion: str, seed: int = 0) -> dict[str, Accuracies]:
    """Returns the accuracies of the network, and of the network with a memory of 40 images of each task."""
    data, generator = digits(), torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.labels), generator=generator)
    tasks = permuted(data.take(rows[500:]), data.take(rows[:500]), tasks=5, generator=generator)
    network = mlp(64, 128, 128, 10, generator=generator)
    memory = EpisodicMemory(capacity=5 * 40, key_size=64)
    learner = Learner(
        network,
        torch.optim.Adam(network.parameters()),
        penalty={"EWC": EWC(network, strength=10.0), "MAS": MAS(network, strength=0.01)}.get(companion),
        replay=Ring(memory) if companion == "replay" else None,
        memory=None if companion == "replay" else memory,
        keep=40,
        epochs=5,
        batch=32,
        generator=generator,
    )
    adaptation = LocalAdaptation(rules.sgd(0.07), steps=10)
    adapted = MbPA(network, memory, neighbors=24, adaptation=adaptation, kernel=gaussian(0.7))
    return run(learner, tasks, predictors={"network": network, "with memory": adapted}, examples=100)


def main() -> None:
    print(f"{'accuracy, forgetting of':<24}{'the network':>16}{'with a memory':>20}")
    for companion in ("nothing", "EWC", "MAS", "replay"):
        results = learn(companion).values()
        print(f"{companion:<20}" + "".join(f"{r.average:>12.1%}{r.forgetting:>8.1%}" for r in results))


if __name__ == "__main__":
    main()
