"""Episodic memory for the models of other libraries: each file needs the extra of its name."""
