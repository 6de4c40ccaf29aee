"""Random weights that matter: transformers' own are so small that layers hardly do, and its gates are shut."""

import torch
from torch import nn


def draw_weights(model: nn.Module) -> None:
    """Draw every parameter, by its kind."""
    for name, parameter in model.named_parameters():
        if "gate" in name.rsplit(".", 1)[-1]:
            torch.nn.init.uniform_(parameter, 0.3, 1.0)
        elif "embedding" in name:
            torch.nn.init.normal_(parameter)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
