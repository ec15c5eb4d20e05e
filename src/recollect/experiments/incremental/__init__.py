"""Section 4.2: half of the classes of Tiny-ImageNet are new to a trained network, and counted at once or not."""
