"""The world drifts away from a trained regression network; two hundred new measurements put it right again.

The network knows the shape of the function, the memory knows where it is now. The neighbors' mean has only the memory,
so it is blurred; the adapted network has both. Settings were chosen with other random seeds (100, 101).
Run: python examples/regression.py
"""

import torch
from torch import Tensor, nn

from recollect import EpisodicMemory, Gaussian, LocalAdaptation, MbPA, NonParametric, rules

NOISE = 0.05


def old_world(x: Tensor) -> Tensor:
    return torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])


def new_world(x: Tensor) -> Tensor:
    return old_world(x) + 0.5 * x[:, :1] + 0.5


def points(count: int) -> Tensor:
    return 2 * torch.rand(count, 2) - 1


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = points(1000)
    y = old_world(x) + NOISE * torch.randn(1000, 1)
    for _ in range(300):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()

    memory = EpisodicMemory(capacity=1_000, key_size=2, value_shape=(1,), value_dtype=torch.float32)
    x = points(200)
    memory.write(x, new_world(x) + NOISE * torch.randn(200, 1))

    adaptation = LocalAdaptation(rules.sgd(0.03), steps=20, parameters=("4",))  # the last layer alone
    models = {
        "the network by itself": net,
        "mean of the 5 neighbors": NonParametric(memory, neighbors=5, likelihood=Gaussian()),
        "the adapted network": MbPA(net, memory, neighbors=10, adaptation=adaptation, likelihood=Gaussian()),
    }
    queries = points(1000)
    print(f"root mean square error in the new world (noise of a measurement: {NOISE})")
    for name, model in models.items():
        error = (model(queries) - new_world(queries)).square().mean().sqrt()
        print(f"{name:<26}{error:.3f}")


if __name__ == "__main__":
    main()
