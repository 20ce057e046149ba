"""Low-rank adapters on CLIP's towers: few trained numbers beside frozen weights.

LoRA (Hu et al. 2022, arXiv 2106.09685): a weight W becomes W + alpha / rank * B A, where A has
`rank` rows and B `rank` columns. B starts at zero, so training starts from exactly the pretrained
model; in the end the product is added to W, so that the model is a plain one again.

    lora.adapt(model, rank=8, alpha=16, dropout=0.0)
    trained = lora.adapter_parameters(model)  # names
    lora.merge(model)  # after training

Adapted are the projections of attention and of MLPs in `towers.CLIP`, and nothing of the graph
branch. An adapted `mlp.c_fc.weight` stands in the state dict as
`mlp.c_fc.parametrizations.weight.original`, `...weight.0.A` and `...weight.0.B`.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

ADAPTED = re.compile(
    r"(visual\.)?transformer\.resblocks\.\d+\."
    r"(attn\.in_proj_|attn\.out_proj\.|mlp\.c_fc\.|mlp\.c_proj\.)weight"
    r"|visual\.attnpool\.[qkvc]_proj\.weight"
)


class LowRank(nn.Module):
    """A weight (rows, columns) plus alpha / rank * B A, as a parametrization of torch.

    parts: how many layers of rows / parts rows the weight stacks, 3 for a fused query, key and
    value; each has an A and a B of its own, (parts, rank, columns) and (parts, rows / parts, rank).
    In training mode each input feature (a column of A, in all parts) is dropped with probability
    `dropout`, and the others are divided by 1 - dropout. It is the same for the whole batch, since
    it acts on the weight; Hu et al. drop for each input anew.
    """

    def __init__(self, rows, columns, rank, alpha, dropout, parts=1):
        super().__init__()
        self.scale = alpha / rank
        self.dropout = dropout
        # The paper's code: Kaiming-uniform with a = sqrt(5), of which this bound is left over.
        bound = columns**-0.5
        self.A = nn.Parameter(torch.empty(parts, rank, columns).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(parts, rows // parts, rank))

    def forward(self, weight):
        kept = F.dropout(torch.ones_like(self.A[0, 0]), self.dropout, self.training)  # (columns,)
        # In bf16 a small change of the weight would be lost.
        with torch.autocast(weight.device.type, enabled=False):
            product = (self.B @ (self.A * kept)).flatten(0, 1)  # (rows, columns)
            return weight + self.scale * product


def adapt(model, rank, alpha, dropout):
    """Put adapters on all projections of a `towers.CLIP` or `model.FGCross`; returns the model.

    Nothing is frozen: which weights train stays as it was, and the adapters train too. Raises
    ValueError where rank is below 1, alpha not above 0, dropout not in [0, 1), or the model is
    adapted already.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: expected at least 1; 4 to 16 is usual")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha}: expected a number above 0; twice the rank is usual")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: expected a number in [0, 1); 0 drops nothing")
    if is_adapted(model):
        raise ValueError("the model is adapted already; call merge(model) first")
    names = [name for name, _ in model.named_parameters() if ADAPTED.fullmatch(name)]
    for full_name in names:
        owner, _, name = full_name.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, name)
        rows, columns = weight.shape
        parts = 3 if name == "in_proj_weight" else 1  # queries, keys and values
        adapter = LowRank(rows, columns, rank, alpha, dropout, parts).to(weight)
        # unsafe: without a trial run, for which a tensor without numbers has no autocast.
        parametrize.register_parametrization(module, name, adapter, unsafe=weight.is_meta)
    return model


def is_adapted(model):
    """Whether a model has adapters."""
    return any(isinstance(module, LowRank) for module in model.modules())


def adapter_parameters(model):
    """Names of the adapters' parameters, as in model.named_parameters()."""
    names = set()
    for owner, module in model.named_modules():
        if isinstance(module, LowRank):
            names |= {f"{owner}.{name}" for name, _ in module.named_parameters()}
    return names


@torch.no_grad()
def merge(model):
    """Add the adapters to their weights in place and take them off; returns the model.

    The state dict has a plain model's names and shapes again. Each weight is still the same
    Parameter, as an optimizer knows it. A model without adapters stays as it is.
    """
    adapted = {name.partition(".parametrizations.")[0] for name in adapter_parameters(model)}
    for owner in sorted(adapted):
        module = model.get_submodule(owner)
        parametrizations = module.parametrizations.eval()  # dropout is not to be merged
        # remove_parametrizations would delete the property from a class that deep copies share.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, parametrization in parametrizations.items():
            parametrization.original.copy_(parametrization())
            module.register_parameter(name, parametrization.original)
    return model
