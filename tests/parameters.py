"""Random parameters with which a wrong model shows in the logits."""

from typing import Any

import numpy as np


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Float32 parameters of these shapes with nothing zero or one, scaled so that activations and logits are near 1.

    Initial weights would not do: at their size a wrong attention or norm hardly shows in the logits.
    """
    rng = np.random.default_rng(seed)
    embed_dim = shapes["embed"]["embedding"].shape[-1]

    def draw(tree: Any, path: tuple[str, ...]) -> Any:
        if hasattr(tree, "items"):
            return {name: draw(leaf, (*path, name)) for name, leaf in tree.items()}
        values = rng.standard_normal(tree.shape)
        if path[-1] == "kernel":
            axes = tree.shape[1:] if "layers" in path else tree.shape
            axes = axes[1:] if "experts" in path else axes
            values /= np.sqrt(np.prod(axes[:2]) if path[-2] == "o" else axes[0])
        elif path[-1] == "embedding":
            values /= np.sqrt(embed_dim)
        else:
            values = 0.2 * values + (1 if path[-1] == "scale" else 0)
        return values.astype(np.float32)

    return draw(shapes, ())
