"""FG-CROSS: CLIP with a graph branch, and its checkpoints.

    image ----------------> CLIP tower ----------------\\
                                                        fusion -> image embedding
    detections -> graph -> projection -> GCN x 3 -> MLP /

The graph convolution is that of Kipf and Welling (2017), on dense batches. Names and shapes of
`gcn1.lin.weight` ... `mlp.2.bias` are those of the published FG-CROSS; unlike there, the pooling
runs over an image's own objects. Sizes in the shapes below: B images, N objects (padded), F node
features, E the embedding width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from backbones.checkpoint_content import check_fields, check_fit, require
from backbones.loading import read_weights, state_dict_in
from backbones.lora import adapt, merge
from backbones.model_configs import model_config_of
from backbones.towers import CLIP, without_numbers
from det_formats.det_json import LabelMap
from options import converted
from V_Graph import GEOMETRY, MAX_OBJECTS, PUBLISHED_LABELS
from writing import written_whole

MOST_COUNTED = 10  # objects of a kind, where they are counted

NEW_LAYERS = ("node_projection", "gcn1", "gcn2", "gcn3", "mlp", "gate")  # which no CLIP has


class GCNConv(nn.Module):
    """Graph convolution D^-1/2 (A + I) D^-1/2 X W + b (Kipf and Welling 2017, equation 2).

    x: (B, N, D), adjacency: (B, N, N) symmetric with zero diagonal, mask: (B, N) bool. Returns
    (B, N, D'); what stands at padded objects is to be masked by the caller.
    """

    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.lin.weight)

    def forward(self, x, adjacency, mask):
        real = mask.to(adjacency.dtype)
        pairs = real[:, :, None] * real[:, None, :]  # (B, N, N)
        loops = adjacency * pairs + torch.diag_embed(real)  # (B, N, N)
        scale = loops.sum(-1).clamp(min=1).rsqrt()  # (B, N); padded rows sum to 0
        propagation = scale[:, :, None] * loops * scale[:, None, :]  # (B, N, N)
        return propagation.to(x.dtype) @ self.lin(x) + self.bias


class FGCross(CLIP):
    """CLIP whose image embedding also holds the image's object graph."""

    def __init__(self, model_config, labels, graph="object", fusion=0.5):
        """A model with random weights.

        labels: how many class ids the label map has, that of "other" included. graph: the branch,
        "object", "counts", "published" or "none". fusion: "gate", or the graph's share of the sum,
        in 0 to 1.
        """
        super().__init__(model_config)
        self.graph = graph
        self.fusion = fusion
        self.labels = labels
        if graph == "none":
            return
        width = model_config["embed_dim"]
        if graph == "object":
            self.node_projection = nn.Linear(labels + GEOMETRY, width)
        if graph != "counts":
            self.gcn1 = GCNConv(width, width)
            self.gcn2 = GCNConv(width, width)
            self.gcn3 = GCNConv(width, width)
        pooled = labels * MOST_COUNTED if graph == "counts" else width
        self.mlp = nn.Sequential(nn.Linear(pooled, width), nn.ReLU(), nn.Linear(width, width))
        if fusion == "gate":
            self.gate = nn.Linear(2 * width, 1)

    def new_parameters(self):
        """Names of the parameters that no CLIP has: they always train, at a rate of their own."""
        return {name for name, _ in self.named_parameters() if name.split(".")[0] in NEW_LAYERS}

    def forward(
        self,
        image,
        text,
        nodes=None,
        adjacency=None,
        mask=None,
        *,
        encoded=False,
        features_only=False,
    ):
        """Images with their graphs, and texts, to logits per image (B, T) and per text (T, B).

        image, text: pixels (B, 3, H, W) and token ids (T, L). With `encoded` they are features: of
        the image tower, (B, E), and of the text tower, (T, E), these of unit length.
        nodes, adjacency, mask: (B, N, F), (B, N, N), (B, N). None of them means no graphs: an
        image's embedding is CLIP's own. Raises ValueError where only some are given.
        features_only: return the unit embeddings of images (B, E) and texts (T, E) instead, which
        is what training needs.
        """
        if encoded:
            image_features = image
            text_features = text
        else:
            image_features = self.encode_image(image)
            text_features = F.normalize(self.encode_text(text), dim=-1)
        image_features = self._embedding(image_features, nodes, adjacency, mask)
        if features_only:
            return image_features, text_features
        return self.logits(image_features, text_features)

    def _embedding(self, image_features, nodes, adjacency, mask):
        """CLIP's features (B, E) and graphs, or None, to unit embeddings (B, E)."""
        missing = [part is None for part in (nodes, adjacency, mask)]
        if all(missing):
            return F.normalize(image_features, dim=-1)
        if any(missing):
            raise ValueError("nodes, adjacency and mask go together: give all three or none")
        return self.branches(image_features, nodes, adjacency, mask)[2]

    def encode_graph(self, nodes, adjacency, mask):
        """Object graphs (B, N, F), (B, N, N), (B, N) to vectors (B, E), zero without objects."""
        if self.graph == "counts":
            graph_features = self.mlp(self.thermometer(nodes, mask))  # (B, E)
            return graph_features * mask.any(dim=1, keepdim=True)
        x = self.node_projection(nodes)  # (B, N, E)
        for layer in (self.gcn1, self.gcn2, self.gcn3):
            x = F.relu(layer(x, adjacency, mask))
        # The sum, not the mean: three planes differ from six.
        graph_features = self.mlp((x * mask[..., None]).sum(dim=1))  # (B, E)
        return graph_features * mask.any(dim=1, keepdim=True)

    def thermometer(self, nodes, mask):
        """Whether a kind is there once, twice ... MOST_COUNTED times or more, (B, K MOST_COUNTED).

        All that is left of a graph where neither places nor edges count: the rival of the GCN.
        """
        counts = (nodes[..., : self.labels] * mask[..., None]).sum(dim=1)  # (B, K)
        levels = torch.arange(1, MOST_COUNTED + 1, device=nodes.device)
        return (counts[..., None] > levels - 0.5).to(nodes.dtype).flatten(1)

    def fuse(self, image_features, graph_features, mask):
        """CLIP's (B, E) and the graph's (B, E) features to unit embeddings (B, E).

        An image without objects, mask (B, N) all False, keeps its normalised CLIP features exactly.
        """
        has_objects = mask.any(1, keepdim=True)  # (B, 1)
        image_features = F.normalize(image_features, dim=-1)
        # In fp16 the gradient of a normalised zero vector is not finite, though nothing uses it.
        graph_features = torch.where(has_objects, graph_features, image_features)
        graph_features = F.normalize(graph_features, dim=-1)
        if self.fusion == "gate":
            both = torch.cat([image_features, graph_features], dim=-1)  # (B, 2 E)
            share = torch.sigmoid(self.gate(both))  # (B, 1)
        else:
            share = self.fusion
        fused = (1 - share) * image_features + share * graph_features
        return torch.where(has_objects, F.normalize(fused, dim=-1), image_features)

    def branches(self, image_features, nodes, adjacency, mask):
        """CLIP's features (B, E) of a batch, with graphs, to CLIP, graph and fused, each (B, E).

        Only the last have unit length. Without a graph branch the graph's features are zero, and
        fused are CLIP's, normalised.
        """
        if self.graph == "none":
            nothing = torch.zeros_like(image_features)
            return image_features, nothing, F.normalize(image_features, dim=-1)
        graph_features = self.encode_graph(nodes, adjacency, mask)
        return image_features, graph_features, self.fuse(image_features, graph_features, mask)


class PublishedFGCross(FGCross):
    """The published FG-CROSS, its graph branch as it was: for comparison with its checkpoints.

    Every image of a batch gets the same graph vector, so embeddings depend on the batch.
    """

    def encode_graph(self, nodes, adjacency, mask):
        """`V_Graph.published_arrays` of a batch, (B, 20, 20) each, to one vector as (B, E).

        Every entry of the degree matrices is a node, its scalar repeated over the width. Image b's
        edges join nodes 20 b ... 20 b + 19, so most of the 400 B nodes have none.
        """
        x = nodes.reshape(-1, 1).expand(-1, self.mlp[0].in_features)  # (400 B, E)
        joined, alone = x[: mask.numel()].unflatten(0, mask.shape), x[mask.numel() :]
        for layer in (self.gcn1, self.gcn2, self.gcn3):
            joined = F.relu(layer(joined, adjacency, mask))  # (B, 20, E)
            alone = F.relu(layer.lin(alone) + layer.bias)  # (380 B, E)
        mean = (joined.sum((0, 1)) + alone.sum(0)) / len(x)  # (E)
        return self.mlp(mean).expand(len(nodes), -1)

    def fuse(self, image_features, graph_features, mask):
        """The weighted sum, (B, E), of which nothing is normalised."""
        return (1 - self.fusion) * image_features + self.fusion * graph_features

    def branches(self, image_features, nodes, adjacency, mask):
        *parts, fused = super().branches(image_features, nodes, adjacency, mask)
        return *parts, F.normalize(fused, dim=-1)


# ------------------------------------------------------------------ checkpoints

VERSION = 2  # of the options and fields in a checkpoint: raise it when older ones cannot be read

# "definition" is what `model_config` is called on the disk, so that older checkpoints can be read.
FIELDS = {"weights", "definition", "labels", "options"}

PUBLISHED = "gcn1.lin.weight"  # in a plain state dict: the published FG-CROSS


def branch_of(graph):
    """The graph branch for an option --graph: control experiments have that of "object"."""
    return "object" if graph in ("exchanged", "no-edges") else graph


def object_limit(options):
    """The most objects of an image that a model's graph branch takes; 0 without a branch."""
    return 0 if options["graph"] == "none" else options["max_objects"]


def build(model_config, labels, options):
    """A model with random weights. labels: lines of the label map; options: with the model's."""
    kind = PublishedFGCross if options["graph"] == "published" else FGCross
    return kind(
        model_config,
        labels=len(LabelMap(labels)),
        graph=branch_of(options["graph"]),
        fusion=options["fusion"],
    )


def add_adapters(model, options):
    """Give a model the low-rank adapters of --train lora; its weights' names change with them."""
    if options.get("train") == "lora":
        rank, alpha, dropout = options["lora"]
        adapt(model, int(rank), alpha, dropout)


def save_checkpoint(path, model, model_config, labels, options, **state):
    """Write a self-describing checkpoint, whole or not at all; OSError names the file.

    state: epoch, best_score and whatever else may be needed, of types that load without unpickling
    code (numbers, strings, lists, dicts, tensors).
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name] = tensor.detach().cpu().contiguous()
    content = {
        "version": VERSION,
        "weights": weights,
        "definition": model_config,
        "labels": labels,
        "options": options,
        **state,
    }
    # To an open file: to a path, torch writes that path's name into the archive.
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def add_to_checkpoint(path, out=None, **fields):
    """Write a checkpoint again, whole or not at all, with further fields; out: to another file."""
    content = {**_read_checkpoint(path), **fields}
    with written_whole(out or path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def latest_checkpoint(runs="runs"):
    """The path of the model that was written last below a folder of runs; says which it is.

    Raises ValueError where there is none.
    """
    found = sorted(Path(runs).glob("*/best_model.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(
            f"{runs}/: no run with a model; train one first (python train.py), or name a model "
            "with --checkpoint"
        )
    print(f"checkpoint of the latest run: {found[-1]}")
    return str(found[-1])


def is_checkpoint(path):
    """Whether a file holds what `load_checkpoint` takes, whatever its format."""
    try:
        content = read_weights(path, mapped=True)
    except ValueError:
        return False
    return _is_ours(content) or _published_weights(content) is not None


def _is_ours(content):
    return isinstance(content, dict) and FIELDS <= content.keys()


def _published_weights(content):
    """The state dict of the published FG-CROSS in what a file holds; None for anything else."""
    weights = state_dict_in(content)
    if weights is None or PUBLISHED not in weights:
        return None
    return weights


def _published_as_ours(weights):
    """A state dict of the published FG-CROSS as a checkpoint; its share is the published one."""
    of_clip = {}
    for name, tensor in weights.items():
        if name.split(".")[0] not in NEW_LAYERS:
            of_clip[name] = tensor
    model_config = {**model_config_of(of_clip), "activation": "quickgelu"}
    return {
        "version": VERSION,
        "weights": weights,
        "definition": model_config,
        "labels": list(PUBLISHED_LABELS),
        "options": {
            "graph": "published",
            "fusion": 0.5,
            "model": model_config["name"],
            "labels": None,
            "max_objects": MAX_OBJECTS,
        },
    }


def load_checkpoint(path, device="cpu"):
    """Rebuild a model from a checkpoint alone, adapters merged.

    Takes `best_model.pth` of the published code too, whose checkpoint has the model's options only.
    Returns (model in eval mode on the device, checkpoint dict). Raises ValueError where the file is
    missing or is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; train one first: python train.py")
    checkpoint = _read_checkpoint(path)
    if not is_this_version(checkpoint):
        raise ValueError(f"{path}: from another version of this code; train it again")
    try:
        checkpoint, model = checked(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    weights = {}  # copies: merging adapters changes a model's
    for name, expected in model.state_dict().items():
        weights[name] = checkpoint["weights"][name].to(dtype=expected.dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    return merge(model).to(device).eval(), checkpoint


def is_this_version(checkpoint):
    """Whether a checkpoint dict states the VERSION of this code."""
    version = checkpoint.get("version")
    return isinstance(version, int) and version == VERSION


def checked(checkpoint):
    """A checkpoint dict with FIELDS, its options as this version names them, and its model.

    The model has names and shapes only: nothing large is built. Raises ValueError where the content
    makes none.
    """
    require(isinstance(checkpoint["options"], dict), "options", "a dict", checkpoint["options"])
    checkpoint = {**checkpoint, "options": converted(checkpoint["options"])}
    check_fields(checkpoint)
    with without_numbers():
        model = _adapted(checkpoint)
    check_fit(checkpoint["weights"], model.state_dict())
    return checkpoint, model


def _adapted(checkpoint):
    """A model with random weights as a checkpoint describes it, with its adapters."""
    model = build(checkpoint["definition"], checkpoint["labels"], checkpoint["options"])
    add_adapters(model, checkpoint["options"])
    return model


def _read_checkpoint(path):
    """The checkpoint dict in a file of ours or of the published FG-CROSS."""
    content = read_weights(path)
    if _is_ours(content):
        return content
    weights = _published_weights(content)
    if weights is None:
        raise ValueError(
            f"{path}: not an FG-CROSS checkpoint; expected the fields {sorted(FIELDS)}"
        )
    try:
        return _published_as_ours(weights)
    except ValueError as error:
        raise ValueError(f"{path}: of the published FG-CROSS, but {error}") from None
