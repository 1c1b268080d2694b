"""The optimizers of a recipe."""

from __future__ import annotations

from torch.optim import AdamW, Muon, Optimizer

from .model import Llama
from .recipe import Recipe

# The recipe's field with the highest learning rate of an optimizer.
LEARNING_RATES = {"adamw": "learning_rate", "muon": "muon_learning_rate"}


def make_optimizers(model: Llama, recipe: Recipe) -> dict[str, Optimizer]:
    """The optimizers by kind; weight decay falls on matrices, never on norms.

    Muon (Jordan, 2024; steps scaled to AdamW's size as in arXiv 2502.16982) takes the matrices of
    the layers; embedding, output head and norms are AdamW's. A learning rate is set at each step.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers.")]
    tables = [
        p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("layers.")
    ]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizers: dict[str, Optimizer] = {}
    if recipe.optimizer == "muon":
        optimizers["muon"] = Muon(
            matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        matrices = []
    optimizers["adamw"] = AdamW(
        [
            {"params": matrices + tables, "weight_decay": recipe.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(recipe.beta1, recipe.beta2),
        fused=model.tok_embed.device.type in ("cpu", "cuda"),
    )
    return optimizers
