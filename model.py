"""FG-CROSS: CLIP with a graph branch, its definition files and its checkpoints.

    image ----------------> CLIP tower ----------------\\
                                                        fusion -> image embedding
    detections -> graph -> projection -> GCN x 3 -> MLP /

The graph convolution is that of Kipf and Welling (2017), on dense batches. Names and shapes of
`gcn1.lin.weight` ... `mlp.2.bias` are those of the published FG-CROSS; unlike there, the pooling
runs over an image's own objects. Sizes in the shapes below: B images, N objects (padded), F node
features, E the embedding width.
"""

import json
import os
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from towers import CLIP
from V_Graph import GEOMETRY, MAX_OBJECTS, Vocabulary

MODELS = Path(__file__).parent / "models"


def add_model_options(parser):
    """The options of the model; they are saved in its checkpoints."""
    option = parser.add_argument_group("model").add_argument
    # fmt: off
    option("--model", help="definition in models/ to train from scratch; default small")
    option("--graph", choices=("object", "none"), default="object", help="none: a plain CLIP")
    option("--fusion", choices=("sum", "gate"), default="sum", help="gate: learned, per image")
    option("--image-encoder-ratio", type=float, nargs=2, default=(0.5, 0.5),
           metavar=("CLIP", "GRAPH"), help="weights of the branches in --fusion sum")
    option("--labels", help="vocabulary of the detections; default det_json/labels.txt")
    option("--max-objects", type=int, default=MAX_OBJECTS, help="raise for crowded images")
    # fmt: on


def definition_names():
    """Names of the model definitions in `models/`."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def read_definition(name):
    """The sizes of a model from `models/<name>.json`; see towers.py for the fields."""
    if name not in definition_names():
        raise ValueError(f"model '{name}': not in {MODELS}; there are {definition_names()}")
    sizes = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    return {"name": name, **sizes}


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

    def __init__(
        self, definition, labels, graph="object", fusion="sum", image_encoder_ratio=(0.5, 0.5)
    ):
        """labels: K, the slots of the vocabulary, "other" included."""
        super().__init__(definition)
        self.graph, self.fusion, self.ratio = graph, fusion, tuple(image_encoder_ratio)
        if graph == "none":
            return
        width = definition["embed_dim"]
        self.node_projection = nn.Linear(labels + GEOMETRY, width)
        self.gcn1 = GCNConv(width, width)
        self.gcn2 = GCNConv(width, width)
        self.gcn3 = GCNConv(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        if fusion == "gate":
            self.gate = nn.Linear(2 * width, 1)

    def new_parameters(self):
        """Names of the parameters that no CLIP has: they always train, at their own rate."""
        names = ("node_projection", "gcn1", "gcn2", "gcn3", "mlp", "gate")
        return {n for n, _ in self.named_parameters() if n.split(".")[0] in names}

    def encode_graph(self, nodes, adjacency, mask):
        """Object graphs (B, N, F), (B, N, N), (B, N) to vectors (B, E), zero without objects."""
        x = self.node_projection(nodes)  # (B, N, E)
        for layer in (self.gcn1, self.gcn2, self.gcn3):
            x = F.relu(layer(x, adjacency, mask))
        # The sum, not the mean: three planes differ from six.
        graph_features = self.mlp((x * mask[..., None]).sum(dim=1))  # (B, E)
        return graph_features * mask.any(dim=1, keepdim=True)

    def fuse(self, image_features, graph_features, mask):
        """CLIP's (B, E) and the graph's (B, E) features to unit embeddings (B, E).

        An image without objects, mask (B, N) all False, keeps its normalised CLIP features exactly.
        """
        image_features = F.normalize(image_features, dim=-1)
        graph_features = F.normalize(graph_features, dim=-1)
        if self.fusion == "gate":
            both = torch.cat([image_features, graph_features], dim=-1)  # (B, 2 E)
            share = torch.sigmoid(self.gate(both))  # (B, 1)
            fused = (1 - share) * image_features + share * graph_features
        else:
            fused = self.ratio[0] * image_features + self.ratio[1] * graph_features
        return torch.where(mask.any(1, keepdim=True), F.normalize(fused, dim=-1), image_features)

    def encode_branches(self, image, nodes, adjacency, mask):
        """CLIP, graph and fused features of a batch, each (B, E); only the last have unit length.

        Without a graph branch the graph's features are zero, and fused are CLIP's, normalised.
        """
        image_features = self.encode_image(image)
        if self.graph == "none":
            nothing = torch.zeros_like(image_features)
            return image_features, nothing, F.normalize(image_features, dim=-1)
        graph_features = self.encode_graph(nodes, adjacency, mask)
        return image_features, graph_features, self.fuse(image_features, graph_features, mask)

    def forward(self, image, nodes, adjacency, mask, text):
        """Unit embeddings of images and of texts, each (B, E)."""
        image_features = self.encode_branches(image, nodes, adjacency, mask)[2]
        return image_features, F.normalize(self.encode_text(text), dim=-1)


# ------------------------------------------------------------------ checkpoints

VERSION = 2  # of the options and fields in a checkpoint: raise it when older ones cannot be read
FIELDS = {"weights", "definition", "labels", "options"}


def build(definition, labels, options):
    """A model with random weights. labels: vocabulary lines; options: dict with the model's."""
    return FGCross(
        definition,
        len(Vocabulary(labels)),
        options["graph"],
        options["fusion"],
        options["image_encoder_ratio"],
    )


def save_checkpoint(path, model, definition, labels, options, **state):
    """Write a self-describing checkpoint, whole or not at all; OSError names the file.

    state: epoch, best_score and whatever else may be needed, of types that load without unpickling
    code (numbers, strings, lists, dicts, tensors).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    content = {"weights": weights, "definition": definition, "labels": labels, "options": options}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, **content, **state}, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path}: not written ({reason}); what stood there is whole, is the disk full?"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path):
    """torch.load without code, on the CPU; raises ValueError that names the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            scripted = any("/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        scripted = False
    if scripted:
        raise ValueError(
            f"{path}: a TorchScript archive; write its weights to a file once: torch.save("
            f"torch.jit.load('{path}', map_location='cpu').state_dict(), 'weights.pt')"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises EOFError, KeyError, RuntimeError, UnpicklingError ...
        kind = type(error).__name__
        raise ValueError(f"{path}: broken, or more than tensors and numbers ({kind})") from None


def is_checkpoint(path):
    """Whether a file is a checkpoint of this project, told without reading its tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            content = archive.read(pickles[0]) if pickles else b""
    except (OSError, zipfile.BadZipFile):
        return False
    return all(field.encode() in content for field in FIELDS)


def load_checkpoint(path, device="cpu"):
    """Rebuild a model from a checkpoint alone.

    Returns (model in eval mode on the device, checkpoint dict). Raises ValueError where the file
    is missing or is not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; train one first: python train.py")
    checkpoint = read_weights(path)
    if not isinstance(checkpoint, dict) or not FIELDS <= set(checkpoint):
        raise ValueError(
            f"{path}: not an FG-CROSS checkpoint; expected the fields {sorted(FIELDS)}"
        )
    if checkpoint.get("version") != VERSION:
        raise ValueError(f"{path}: from another version of this code; train it again")
    model = build(checkpoint["definition"], checkpoint["labels"], checkpoint["options"])
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError as error:
        raise ValueError(f"{path}: weights and definition do not fit: {error}") from None
    return model.to(device).eval(), checkpoint
