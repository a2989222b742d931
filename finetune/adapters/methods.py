"""Adapter methods: what is put beside a frozen layer. To add one, write its function and name it in METHODS and, with
its formula, in `updates.UPDATES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from torch import nn


@dataclass(frozen=True)
class Shape:
    """How large an adapter is, and what else its method is told.

    Attributes:
        rank: width of the low-rank update, or size of a block (oft, boft).
        alpha: the update is scaled by alpha / rank.
        dropout: share dropped in training; see `config.adapter`.
        init: name in `starts.INITS`.
        lora_plus_ratio: learning rate of lora_B over that of lora_A.
        factor: size of lokr's left factor; -1 for one near the square root.
        tucker: whether loha and lokr decompose whole kernels.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    init: str = "default"
    lora_plus_ratio: float = 1.0
    factor: int = -1
    tucker: bool = False


@dataclass(frozen=True)
class Where:
    """The layers a PEFT configuration goes to, as PEFT spells it.

    Attributes:
        pattern: matches the whole names of the layers and nothing else.
        ranks: pattern -> rank, for layers whose rank is not the shape's.
        alphas: the same for alpha.
    """

    pattern: str
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def _lora(shape: Shape, where: Where, **variant: bool) -> PeftConfig:
    return LoraConfig(
        r=shape.rank,
        # keep: PEFT types alpha as int but only divides by it; a fraction is as good.
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=where.pattern,
        rank_pattern=where.ranks,
        alpha_pattern=where.alphas,
        bias="none",
        **variant,
    )


def lora(shape: Shape, where: Where) -> PeftConfig:
    """W + (alpha / rank) B A with B zero at the start. Source: Hu et al. 2021, LoRA, arXiv:2106.09685."""
    return _lora(shape, where)


def rslora(shape: Shape, where: Where) -> PeftConfig:
    """lora scaled by alpha / sqrt(rank), so that large ranks learn as fast as small ones.

    Source: Kalajdzievski 2023, rsLoRA, arXiv:2312.03732.
    """
    return _lora(shape, where, use_rslora=True)


def locon(shape: Shape, where: Where) -> PeftConfig:
    """lora on convolutions too: A is a convolution of the layer's kernel, B is 1x1.

    Source: Yeh et al. 2023, LyCORIS, arXiv:2309.14859, section 3.1.
    """
    return _lora(shape, where)


def dora(shape: Shape, where: Where) -> PeftConfig:
    """lora on the directions of W, with one learned length per output. About half more time per step.

    Source: Liu et al. 2024, DoRA, arXiv:2402.09353.
    """
    return _lora(shape, where, use_dora=True)


def loha(shape: Shape, where: Where) -> PeftConfig:
    """W + (alpha / rank) (A1 B1) * (A2 B2): rank up to rank^2 for twice lora's parameters.

    Source: Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098.
    """
    return LoHaConfig(
        r=shape.rank, alpha=shape.alpha, rank_dropout=shape.dropout, use_effective_conv2d=shape.tucker,
        target_modules=where.pattern, rank_pattern=where.ranks, alpha_pattern=where.alphas,
    )  # fmt: skip


def lokr(shape: Shape, where: Where) -> PeftConfig:
    """W + (alpha / rank) C kron D: a very small file; D is whole where rank reaches half its side.

    Source: Yeh et al. 2023, LyCORIS, arXiv:2309.14859.
    """
    return LoKrConfig(
        r=shape.rank, alpha=shape.alpha, rank_dropout=shape.dropout, use_effective_conv2d=shape.tucker,
        decompose_factor=shape.factor,
        target_modules=where.pattern, rank_pattern=where.ranks, alpha_pattern=where.alphas,
    )  # fmt: skip


def oft(shape: Shape, where: Where) -> PeftConfig:
    """W R^T: blocks of `rank` inputs are rotated, so angles between neurons stay. alpha has no meaning.

    Source: Qiu et al. 2023, OFT, arXiv:2306.07280. The Cayley transform is exact, not PEFT's series.
    """
    return OFTConfig(
        r=0, oft_block_size=shape.rank, module_dropout=shape.dropout, use_cayley_neumann=False,
        target_modules=where.pattern,
    )  # fmt: skip


def boft(shape: Shape, where: Where) -> PeftConfig:
    """oft with a gain per output; one butterfly factor, the number that needs no compiler. alpha has no meaning.

    Source: Liu et al. 2023, BOFT, arXiv:2311.06243.
    """
    return BOFTConfig(
        boft_block_size=shape.rank, boft_n_butterfly_factor=1, boft_dropout=shape.dropout, target_modules=where.pattern
    )


def ia3(shape: Shape, where: Where) -> PeftConfig:
    """One gain per input of a layer: the smallest adapter. rank and alpha have no meaning.

    The form the paper gives feed-forward layers, used for every layer because it leaves biases alone.

    Source: Liu et al. 2022, (IA)^3, arXiv:2205.05638.
    """
    return IA3Config(target_modules=where.pattern, feedforward_modules=where.pattern)


def full(shape: Shape, where: Where) -> None:
    """The layers' own weights and biases are trained: classic DreamBooth. The file holds them whole.

    Source: Ruiz et al. 2022, DreamBooth, arXiv:2208.12242.
    """


def any_layer(layer: nn.Module, shape: Shape) -> str | None:
    """Every linear layer and convolution."""
    return None


def rotatable(layer: nn.Module, shape: Shape) -> str | None:
    """Linear layers and 1x1 convolutions whose inputs split into blocks of `rank`."""
    if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        size = "x".join(map(str, layer.kernel_size))
        return f"is a {size} convolution, which cannot be rotated here; leave convolutions out, e.g. attention+mlp"
    inputs = layer.weight.shape[1]
    if inputs % shape.rank:
        fitting = [size for size in range(2, inputs + 1) if inputs % size == 0]
        near = sorted(fitting, key=lambda size: abs(size - shape.rank))[:3]
        return f"has {inputs} inputs, which blocks of rank={shape.rank} do not divide; {', '.join(map(str, near))} do"
    return None


def storage_of(layer: nn.Module) -> str:
    """How a layer's weight is held: "plain" numbers it computes with, "fp8", "packed" into integers (int8, nf4), or on
    the "host", where the layer may not compute.
    """
    weight = getattr(layer, "weight", None)
    if hasattr(layer, "resident"):
        return "host"
    # keep: bitsandbytes packs a weight when it is moved to its device, which may be later.
    if type(weight).__name__ == "Params4bit" or (weight is not None and not weight.is_floating_point()):
        return "packed"
    return "fp8" if weight is not None and weight.is_floating_point() and weight.dtype.itemsize == 1 else "plain"


@dataclass(frozen=True)
class Method:
    """A way to change layers.

    Attributes:
        config: from shape and place to PEFT's configuration; None where there is nothing beside the layer.
        refuses: why a layer cannot have it, or None.
        targets: the preset when none is named.
        per_layer: whether layers may differ in rank and alpha.
        dropout: whether it knows dropout.
        factors: whether it is lora_A and lora_B, so that init and lora_plus_ratio mean something.
        beside: whether its tensors stand beside frozen weights; if not, the weights themselves are trained.
        storage: how the base's weights may be held: see `storage_of`.
    """

    config: Callable[[Shape, Where], PeftConfig | None]
    refuses: Callable[[nn.Module, Shape], str | None] = any_layer
    targets: str = "attention"
    per_layer: bool = True
    dropout: bool = True
    factors: bool = False
    beside: bool = True
    storage: frozenset[str] = frozenset({"plain", "fp8", "host"})


EVERYTHING = "everything"
"""The preset of all layers that hold weights, norms and embeddings among them."""

ANY_STORAGE = frozenset({"plain", "fp8", "host", "packed"})
PLAIN = frozenset({"plain"})
"""For methods that compute with the layer's own weight in every step."""

METHODS: dict[str, Method] = {
    "lora": Method(lora, factors=True, storage=ANY_STORAGE),
    "rslora": Method(rslora, factors=True, storage=ANY_STORAGE),
    "locon": Method(locon, factors=True, storage=ANY_STORAGE, targets="all"),
    "dora": Method(dora, factors=True, storage=PLAIN),
    "loha": Method(loha),
    "lokr": Method(lokr),
    "oft": Method(oft, refuses=rotatable, per_layer=False),
    "boft": Method(boft, refuses=rotatable, per_layer=False, storage=PLAIN),
    "ia3": Method(ia3, per_layer=False, dropout=False),
    "full": Method(full, targets=EVERYTHING, per_layer=False, dropout=False, beside=False, storage=PLAIN),
}
