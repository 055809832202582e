"""Adam's moments as tensors beside the weights: clients send theirs, and all go on from those of the mean gradient.

A client then steps where all of them go, and not only where its own text pulls it. Karimireddy et al., 2020 (Mime).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from builders.training.optimiser import optimisers, trained
from online.federated.tensors import MOMENT, Floats, Tensors
from online.learner.recipe import UpdateRecipe


def no_moments(model: Any, recipe: UpdateRecipe) -> dict[str, Floats]:
    """Those of a training that has not begun: zeros, by the names and in the shapes that clients send."""
    import torch

    masters = [parameter.detach().clone().requires_grad_() for parameter in trained(model)]
    made = optimisers(model, masters, recipe.optimiser)
    for master in masters:
        master.grad = torch.zeros_like(master)
    for optimiser in made:
        for group in optimiser.param_groups:
            group["lr"] = 0.0
        optimiser.step()
    return moments_of([optimiser.state_dict() for optimiser in made])


def moments_of(states: list[dict[str, Any]]) -> dict[str, Floats]:
    """Of the states, what is as large as a weight."""
    return {
        f"{MOMENT}{place}/{index}/{key}": value.float().numpy().copy()
        for place, state in enumerate(states)
        for index, entries in state["state"].items()
        for key, value in entries.items()
        if value.ndim
    }


def states_of(moments: Tensors, steps: int) -> list[dict[str, Any]]:
    """As `moments_of` names them, after so many steps."""
    import torch

    found: dict[int, dict[int, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in moments.items():
        place, index, key = name.removeprefix(MOMENT).split("/")
        found[int(place)][int(index)][key] = torch.from_numpy(np.array(value))
    for entries in found.values():
        for entry in entries.values():
            entry["step"] = torch.tensor(float(steps))
    return [{"state": dict(found[place])} for place in sorted(found)]
