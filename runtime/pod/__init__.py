"""What is of a pod alone: a store of published models, versions that are staged, and the port that asks for them."""
