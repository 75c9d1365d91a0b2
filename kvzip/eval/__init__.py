"""How much of a model's answers a compressed cache keeps: tasks, metrics, fidelity."""
