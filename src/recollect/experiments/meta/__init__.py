"""Learned memories: MANN, MAML, the Meta-LSTM, learned optimizers and hypernetworks, beside the published numbers."""
