"""The proof that a version carries (inputs, the reference's outputs, the budget), and the judgement of what came."""
