"""A classifier in use learns a new class from twenty examples, without training, and forgets it on request.

The network is trained on the digits 0 to 8 and has never seen a 9. Neighbors, rate and steps were chosen on validation
images, split off the training images; what is printed is the accuracy on test images.
"""

import torch
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
from recollect.data import Dataset, digits


def deployed_classifier(seed: int = 0) -> tuple[nn.Module, nn.Module, Dataset, Dataset, Dataset]:
    """Returns features and head, 20 training images of each digit they know, 20 nines, and test images of all ten."""
    torch.manual_seed(seed)
    data = digits()
    rows = torch.randperm(len(data.labels))
    train, test = data.take(rows[:1000]), data.take(rows[1000:])
    old, nines = train.take(train.labels < 9), train.take(train.labels == 9)
    features, head = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.LayerNorm(128)), nn.Linear(128, 10)
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features(old.inputs)), old.labels).backward()
        optimizer.step()
    some = torch.cat([(old.labels == digit).nonzero()[:20, 0] for digit in range(9)])
    return features, head, old.take(some), nines.take(slice(20)), test


def main() -> None:
    features, head, known, nines, test = deployed_classifier()
    memory = EpisodicMemory(capacity=1_000, key_size=128)
    layer = MbPA(head, memory, neighbors=10, adaptation=LocalAdaptation(rules.sgd(0.1), steps=10))
    model = nn.Sequential(features, layer)
    is_nine = test.labels == 9

    def report(when: str) -> None:
        right = (model(test.inputs).argmax(-1) == test.labels).float()
        print(f"{when:<28}{right[is_nine].mean():7.1%}{right[~is_nine].mean():9.1%}")

    print(f"{'accuracy on test images of':<28}{'9':>7}{'0 to 8':>9}")
    report("the network by itself")
    memory.write(features(known.inputs), known.labels)  # what it should go on knowing
    slots = memory.write(features(nines.inputs), nines.labels)
    report("20 nines in the memory")
    memory.forget(slots)
    report("the nines forgotten again")


if __name__ == "__main__":
    main()
