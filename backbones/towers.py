"""CLIP's image and text towers: ViT, ModifiedResNet and a causal text transformer.

Architecture and parameter names follow OpenAI CLIP (https://github.com/openai/CLIP, MIT), so that
its state dicts load strictly; the code is our own. The sizes come from a model config in `models/`:

    {"embed_dim": 512, "image_size": 224,
     "vision": {"patch_size": 32, "width": 768, "layers": 12, "heads": 12},
     "text": {"context_length": 77, "vocab_size": 49408, "width": 512, "layers": 12, "heads": 8}}

An `"activation": "gelu"` beside them is for weights that were not trained with OpenAI's QuickGELU.
A `vision` whose `layers` is a list of four is a ModifiedResNet and has no `patch_size`. A `text` of
0 layers, which no CLIP has, is the mean of its words' embeddings, for comparison. Sizes in the
shapes below: B images or texts, L positions, D width, E the common embedding width.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

RESNET_STRIDE = 32  # pixels of the image, along one side, that a ModifiedResNet's position covers


def _drawn(*shape, std):
    """A tensor of first weights."""
    return nn.init.normal_(torch.empty(*shape), std=std)


@contextmanager
def without_numbers():
    """Models that are built within have names and shapes, but no numbers, and take no memory."""
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Leaves out the drawing of first weights.

    Without numbers it would do nothing but make torch import its compiler, for two seconds.
    """

    DRAWS = {nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.xavier_uniform_}

    def __torch_function__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        if function in self.DRAWS:
            return settings["tensor"] if "tensor" in settings else arguments[0]
        return function(*arguments, **settings)


def is_resnet(vision):
    """Whether the `vision` of a model config describes a ModifiedResNet."""
    return isinstance(vision["layers"], list)


def vision_channels(vision):
    """Channels of an image tower's last layer, which its heads share.

    Those of a ModifiedResNet double in three of the four stages, and a Bottleneck expands them.
    """
    if is_resnet(vision):
        return vision["width"] * 2**3 * Bottleneck.expansion
    return vision["width"]


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's weights were trained with.

    It is x sigmoid(1.702 x), written with SiLU: the backward pass then keeps one tensor, not two.
    """

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}


def by_head(x, heads):
    """(B, L, D) to (B, heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, L, D / heads)


def attention(query, key, value, causal=False, seen=None):
    """Softmax attention of each head (Vaswani et al. 2017, equation 1), (B, heads, Q, D / heads).

    query: (B, heads, Q, D / heads); key, value: (B, heads, L, D / heads). causal: no position
    attends to a later one. seen: bool, to be broadcast to (B, heads, Q, L), not together with
    causal; None: everything.
    """
    on_cpu = query.device.type == "cpu"
    if not (on_cpu and query.requires_grad and query.dtype != torch.float32):
        return F.scaled_dot_product_attention(query, key, value, seen, is_causal=causal)
    # In half precision the backward pass of torch's kernel takes a CPU five times as long as this.
    if causal:
        length = query.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool).tril()  # (L, L)
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5  # (B, heads, Q, L)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(dim=3).to(value.dtype) @ value


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), to be computed at all positions or at one.

    Parameters have the names and first values of torch's MultiheadAttention, CLIP's. That module
    would compute all queries, and without gradients it casts and copies more.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal=False):
        """(B, L, D) to (B, L, D); causal: no position attends to a later one."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3 D)
        query, key, value = projected.chunk(3, dim=-1)
        return self._attended(query, key, value, causal=causal)

    def at(self, x, positions, seen=None):
        """(B, L, D) to what stands at the positions (B,), (B, D).

        seen: (B, L) bool, what each of them attends to; None: everything.
        """
        width = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        own = x[torch.arange(len(x), device=x.device), positions]  # (B, D)
        query = F.linear(own[:, None], weight[:width], bias[:width])  # (B, 1, D)
        key, value = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        if seen is not None:
            seen = seen[:, None, None]  # (B, 1, 1, L)
        return self._attended(query, key, value, seen=seen)[:, 0]  # (B, D)

    def _attended(self, query, key, value, causal=False, seen=None):
        query, key, value = (by_head(part, self.heads) for part in (query, key, value))
        x = attention(query, key, value, causal, seen)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, D)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False):
        """(B, L, D) to (B, L, D)."""
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))

    def at(self, x, positions, seen=None):
        """(B, L, D) to the output at the positions (B,), (B, D); seen: as of `Attention.at`."""
        own = x[torch.arange(len(x), device=x.device), positions]  # (B, D)
        own = own + self.attn.at(self.ln_1(x), positions, seen)
        return own + self.mlp(self.ln_2(own))


class Transformer(nn.Module):
    """A stack of residual attention blocks, read at one position of each image or text.

    Only there the last block is computed: its other outputs have no use. With `recompute` the
    blocks' inner values are not kept for the backward pass, but computed again (Chen et al. 2016).
    """

    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, activation) for _ in range(layers)
        )
        self.recompute = False

    def forward(self, x, positions, causal=False):
        """(B, L, D) to the output at positions (B,), (B, D).

        causal: no position attends to a later one.
        """
        seen = None
        if causal:
            seen = torch.arange(x.shape[1], device=x.device) <= positions[:, None]  # (B, L)
        *blocks, last = self.resblocks
        for block in blocks:
            x = self._computed(block, x, causal)
        return self._computed(last.at, x, positions, seen)

    def _computed(self, function, *arguments):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


class VisionTransformer(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021), (B, 3, H, W) to (B, E)."""

    def __init__(self, image_size, embed_dim, activation, patch_size, width, layers, heads):
        super().__init__()
        scale = width**-0.5
        positions = (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(_drawn(width, std=scale))
        self.positional_embedding = nn.Parameter(_drawn(positions, width, std=scale))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(_drawn(width, embed_dim, std=scale))

    def forward(self, image):
        x = self._embedded_patches(image)  # (B, patches, D)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (B, 1, D)
        x = torch.cat([first, x], dim=1)  # (B, L, D)
        x = self.ln_pre(x + self.positional_embedding)
        of_class = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.ln_post(self.transformer(x, of_class)) @ self.proj  # (B, E)

    def _embedded_patches(self, image):
        """What conv1 gives of an image (B, 3, H, W), as one matrix product, (B, patches, D).

        The convolution's own backward pass in bf16 takes a CPU twenty times as long.
        """
        side = self.conv1.kernel_size[0]
        rows, columns = image.shape[2] // side, image.shape[3] // side
        image = image[:, :, : rows * side, : columns * side]
        x = image.unflatten(2, (rows, side)).unflatten(4, (columns, side))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, 3 side side)
        return F.linear(x, self.conv1.weight.flatten(1))  # (B, patches, D)


class Bottleneck(nn.Module):
    """ResNet bottleneck that average-pools where others stride (anti-aliasing)."""

    expansion = 4

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.downsample = None
        if stride > 1 or inplanes != outplanes:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(inplanes, outplanes, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(outplanes))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """One attention query, the mean, over all positions of a feature map."""

    def __init__(self, side, width, heads, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(_drawn(side**2 + 1, width, std=width**-0.5))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        self.heads = heads

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, H W, D)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, L, D)
        x = x + self.positional_embedding
        query = by_head(self.q_proj(x[:, :1]), self.heads)
        key = by_head(self.k_proj(x), self.heads)
        value = by_head(self.v_proj(x), self.heads)
        x = F.scaled_dot_product_attention(query, key, value)  # (B, heads, 1, D / heads)
        return self.c_proj(x.transpose(1, 2).flatten(1))  # (B, E)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: three-convolution stem, pooled strides, attention pooling. To (B, E)."""

    def __init__(self, image_size, embed_dim, width, layers, heads):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inplanes = width
        for i, blocks in enumerate(layers):
            planes = width * 2**i
            strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
            stage = []
            for stride in strides:
                stage.append(Bottleneck(inplanes, planes, stride))
                inplanes = planes * Bottleneck.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool2d(image_size // RESNET_STRIDE, inplanes, heads, embed_dim)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(F.relu(self.bn3(self.conv3(x))))  # (B, width, H / 4, W / 4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 32 width, H / 32, W / 32)
        return self.attnpool(x)


class CLIP(nn.Module):
    """Both towers and the learned temperature (Radford et al. 2021)."""

    def __init__(self, model_config):
        super().__init__()
        vision, text = model_config["vision"], model_config["text"]
        activation = ACTIVATIONS[model_config.get("activation", "quickgelu")]
        image_size, embed_dim = model_config["image_size"], model_config["embed_dim"]
        if is_resnet(vision):
            self.visual = ModifiedResNet(image_size, embed_dim, **vision)
        else:
            self.visual = VisionTransformer(image_size, embed_dim, activation, **vision)
        self.transformer = Transformer(text["width"], text["layers"], text["heads"], activation)
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.positional_embedding = nn.Parameter(torch.empty(text["context_length"], text["width"]))
        self.ln_final = nn.LayerNorm(text["width"])
        self.text_projection = nn.Parameter(torch.empty(text["width"], embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialise(text["width"], text["layers"])

    def _initialise(self, width, layers):
        """OpenAI CLIP's initialisation; blocks of depth n start with a variance of 1 / n."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)
        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            for module in self.visual.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)

    def forward(self, image, text):
        """Pixels (B, 3, H, W) and token ids (T, L) to logits per image (B, T) and per text (T, B).

        A logit is the cosine of the features times the learned temperature's exponential.
        """
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(text), dim=-1)
        return self.logits(image_features, text_features)

    def logits(self, image_features, text_features):
        """Unit features (B, E) and (T, E) to logits per image (B, T) and per text (T, B)."""
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        return logits_per_image, logits_per_image.T

    def encode_image(self, image):
        """Pixels (B, 3, H, W), normalised as `clip.preprocess` does, to features (B, E)."""
        return self.visual(image)

    def encode_text(self, text):
        """Token ids (B, L), L up to the context length, to features (B, E).

        The feature is read at the end token, the largest id, and attention is causal: what
        follows it changes nothing, so batches may be cut after their longest text.
        """
        if not self.transformer.resblocks:
            return self.ln_final(self._mean_word(text)) @ self.text_projection  # (B, E)
        length = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:length]  # (B, L, D)
        x = self.transformer(x, text.argmax(dim=-1), causal=True)  # (B, D)
        return self.ln_final(x) @ self.text_projection  # (B, E)

    def _mean_word(self, text):
        """Token ids (B, L) to the mean embedding (B, D) of those between start and end token."""
        positions = torch.arange(text.shape[1], device=text.device)
        words = (positions > 0) & (positions < text.argmax(dim=-1, keepdim=True))  # (B, L)
        total = (self.token_embedding(text) * words[..., None]).sum(dim=1)
        return total / words.sum(dim=1, keepdim=True).clamp(min=1)
