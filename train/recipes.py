"""Complete recipes: a name stands for every number of a training run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from kinetok.errors import UserError
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.evaluator import EvaluatorConfig
from kinetok.train.optim import LoopConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecipe:
    """``windows`` are lengths in frames, each with its share of the batches of ``frames`` frames in all; draws go by label
    count to the power ``balance``. Windows must be longer than what a frame depends on: a network that has only seen
    windows of 64 frames knows each by its padded start, and decodes whole clips worse.

    ``unrounded`` is the share of samples that pass the quantiser unrounded at the start; it falls to none over the
    first 30 % of the steps and keeps the codebook from collapsing. ``bands`` weighs the upper half of the frequencies
    (train/losses.py). ``bf16`` runs the convolutions in bfloat16, with fp32 weights, quantiser and losses.
    """

    model: TokenizerConfig
    loop: LoopConfig
    frames: int = 1280
    windows: tuple[tuple[int, float], ...] = ((160, 0.55), (80, 0.25), (40, 0.2))
    balance: float = -0.5
    unrounded: float = 0.3
    latent_price: float = 1e-3
    bands: float = 0.0
    bf16: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderRecipe:
    """``corrupt`` is the share of input tokens replaced at random, ``empty`` the share of captions left out.

    ``text_noise`` is the deviation of the noise added to text features; crops are at least ``min_seconds`` long, the
    liveliest of ``crops`` drawn ones. ``turn_words`` is how often a caption names the crop's turn, where it has one. Clips
    shorter than ``lengthened`` seconds are also used repeated to that length, where their ends meet (train/data/augment.py).
    """

    model: DecoderConfig
    loop: LoopConfig
    batch: int = 24
    dropout: float = 0.1
    corrupt: float = 0.1
    empty: float = 0.1
    text_noise: float = 0.05
    balance: float = -0.35
    min_seconds: float = 2.0
    max_seconds: float = 10.0
    crops: int = 3
    turn_words: float = 0.5
    lengthened: float = 6.0
    bf16: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatorRecipe:
    """Crops are of ``min_frames`` to ``max_frames``; ``held_out`` is the share of training recordings that judge.

    ``temperature`` divides the cosines of the contrast; ``text_noise`` as in ``DecoderRecipe``.
    """

    model: EvaluatorConfig
    loop: LoopConfig
    batch: int = 48
    min_frames: int = 60
    max_frames: int = 300
    temperature: float = 0.1
    text_noise: float = 0.05
    balance: float = -0.5
    held_out: float = 0.1
    bf16: bool = True


def mini_tokenizer() -> TokenizerRecipe:
    """3 M parameters, 15,360 codes, 15 tokens a second, causal (no look-ahead in a stream), no wavelet; 25 minutes."""
    return TokenizerRecipe(
        model=TokenizerConfig(nb_code=16384, code_dim=256, width=256, patcher="none", causal=True),
        loop=LoopConfig(
            steps=12000, lr=1e-3, betas=(0.9, 0.99), ema=0.998, validate_every=400, save_every=400, keep="last"
        ),
    )


ABLATION: dict[str, tuple[int, dict[str, object], float]] = {
    # 15 tokens a second
    "strides": (5500, {"patcher": "none"}, 0.0),
    "haar": (5090, {"patcher": "haar", "patch_size": 2, "stride_t": 1}, 0.0),
    "haar-bands": (4940, {"patcher": "haar", "patch_size": 2, "stride_t": 1}, 0.5),
    "db2": (4940, {"patcher": "db2", "patch_size": 2, "stride_t": 1}, 0.0),
    # 7.5 tokens a second
    "two-strides": (3850, {"patcher": "none", "down_t": 2}, 0.0),
    "haar-stride": (6140, {"patcher": "haar", "patch_size": 2}, 0.0),
}
"""The wavelet ablation: steps that take 7 minutes on one core each (timed one after the other), what differs in the model,
and the weight of the upper band."""


def ablation_tokenizer(variant: str) -> TokenizerRecipe:
    """The mini tokenizer at half its width, so that each variant reaches its plateau in 7 minutes on one core."""
    steps, changes, bands = ABLATION[variant]
    mini = mini_tokenizer()
    model = replace(mini.model, nb_code=1024, width=128, code_dim=128, **changes)  # type: ignore[arg-type]
    loop = replace(mini.loop, steps=steps, validate_every=500, save_every=500, keep="best")
    return replace(mini, model=model, loop=loop, windows=((64, 0.8), (32, 0.2)), bands=bands)


def mini_decoder() -> DecoderRecipe:
    """4.8 M parameters, of which 2.9 M are the table of codes (tied to the head), on MiniLM token states."""
    return DecoderRecipe(
        model=DecoderConfig(n_layer=4, n_head=6, n_embd=192, codebook=15360, text_dim=384, tie_weights=True),
        loop=LoopConfig(
            steps=3200,
            lr=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.1,
            ema=0.995,
            validate_every=200,
            save_every=200,
            keep="last",  # the held-out clips stand and walk: their loss is lowest before kicks and waves are learnt
        ),
        balance=-0.6,
    )


def mini_evaluator() -> EvaluatorRecipe:
    """0.9 M parameters on MiniLM token states; held-out captions are matched best after about 400 steps."""
    return EvaluatorRecipe(
        model=EvaluatorConfig(latent_dim=128, num_layers=3, num_heads=4, ff_size=256, text_dim=384),
        loop=LoopConfig(steps=800, lr=7e-4, weight_decay=0.05, ema=0.98, validate_every=50, save_every=50),
    )


# What the shipped model can be asked without a text encoder.
MINI_BANK = (
    "a person walks forward",
    "a person walks",
    "a person stands still",
    "a person stands idle",
    "a person runs",
    "a person runs forward",
    "a person jumps",
    "a person jumps forward",
    "a person hops",
    "a person hops forward",
    "a person dances",
    "a person dances salsa",
    "a person waves",
    "a person waves with the right hand",
    "a person waves with the left hand",
    "a person kicks",
    "a person kicks with the right leg",
    "a person punches",
    "a person practices karate",
    "a person turns left",
    "a person turns right",
    "a person sneaks",
    "a person walks backwards",
    "a person dribbles a basketball",
    "a person boxes",
)

TOKENIZER_RECIPES: dict[str, Callable[[], TokenizerRecipe]] = {
    "mini": mini_tokenizer,
    **{f"ablation-{variant}": partial(ablation_tokenizer, variant) for variant in ABLATION},
}
DECODER_RECIPES: dict[str, Callable[[], DecoderRecipe]] = {"mini": mini_decoder}
EVALUATOR_RECIPES: dict[str, Callable[[], EvaluatorRecipe]] = {"mini": mini_evaluator}


def _named(kind: str, table: dict, name: str):  # type: ignore[no-untyped-def]
    if name not in table:
        raise UserError(f"unknown {kind} recipe {name!r}: expected one of {sorted(table)}")
    return table[name]()


def tokenizer_recipe(name: str) -> TokenizerRecipe:
    return _named("tokenizer", TOKENIZER_RECIPES, name)


def decoder_recipe(name: str) -> DecoderRecipe:
    return _named("decoder", DECODER_RECIPES, name)


def evaluator_recipe(name: str) -> EvaluatorRecipe:
    return _named("evaluator", EVALUATOR_RECIPES, name)
