"""A network with its memory is saved, loaded, and goes on exactly where it was: same answers, same ring of entries.

The folder holds config.json and safetensors, no pickled code, so a file from a stranger can at worst fail to load.
"""

import tempfile
from pathlib import Path

import torch
from correct_a_classifier import deployed_classifier
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, load, rules, save


def main() -> None:
    features, head, known, nines, test = deployed_classifier()
    memory = EpisodicMemory(capacity=1_000, key_size=128, key_dtype=torch.float16)  # half the space
    memory.write(features(known.inputs), known.labels)
    layer = MbPA(head, memory, neighbors=10, adaptation=LocalAdaptation(rules.sgd(0.1), steps=10))
    model = nn.Sequential(features, layer)
    answers = model(test.inputs)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(model, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"saved {', '.join(sorted(file.name for file in folder.iterdir()))}: {size / 1024:.0f} KiB")
        again = load(folder)

    print(f"loaded: {again[1].memory}")
    print(f"same answers, bit for bit: {torch.equal(again(test.inputs), answers)}")
    again[1].memory.write(again[0](nines.inputs), nines.labels)
    right = (again(test.inputs).argmax(-1) == test.labels)[test.labels == 9].float().mean()
    print(f"the loaded model learns a new class: {right:.1%} of the nines")
    print(f"and the one that was saved stays as it was: {torch.equal(model(test.inputs), answers)}")


if __name__ == "__main__":
    main()
