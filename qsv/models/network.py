"""A network described by its name, arguments and front end: all that rebuilds it from a file."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qsv.frontend import (
    FrontEnd,
    KaldiFbank,
    LogMelSpectrogram,
    MelSpectrogram,
    SpeechBrainFbank,
    frontend_from_json,
    frontend_to_json,
)
from qsv.models.attentive_resnet import ATTENTIVE_STAGE_BLOCKS, AttentiveResNet
from qsv.models.campplus import CAMPPlus
from qsv.models.df_resnet import DEPTHS, GEMINI_DEPTHS, DFResNet
from qsv.models.dnsmos import DNSMOS
from qsv.models.ecapa import ECAPA
from qsv.models.eres2net import ERes2NetV2
from qsv.models.ge2e import GE2E
from qsv.models.quantized_activations import quantized_activations
from qsv.models.resnet import STAGE_BLOCKS, ResNet
from qsv.quant import QuantizedActivations

Variables = Mapping[str, Any]
Use = Literal["speaker", "quality"]

# How a computation is run, not what is computed: set by `Network.module(...)`, never stored with a model.
_NOT_ARGUMENTS = ("parent", "name", "dtype", "batch_axis")


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a name stands for.

    Attributes:
        module: the Linen class.
        fixed: arguments that the name fixes.
        frontend: the front end that published networks of this kind have.
        width: the argument that sets how wide it is, if it has one.
        use: whether its outputs are speaker embeddings or a score of quality.
    """

    module: type[nn.Module]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frontend: FrontEnd = KaldiFbank()
    width: str = ""
    use: Use = "speaker"


_MODELS = {
    **{f"resnet{depth}": _Model(ResNet, {"depth": depth}, width="width") for depth in STAGE_BLOCKS},
    **{
        f"{'gemini_' * (depth in GEMINI_DEPTHS)}df_resnet{depth}": _Model(DFResNet, {"depth": depth}, width="width")
        for depth in DEPTHS
    },
    **{
        f"resnet{depth}": _Model(AttentiveResNet, {"depth": depth}, KaldiFbank(energy=True), width="width")
        for depth in ATTENTIVE_STAGE_BLOCKS
    },
    "campplus": _Model(CAMPPlus),
    "eres2netv2": _Model(ERes2NetV2, width="width"),
    "ecapa": _Model(ECAPA, {"dialect": "wespeaker"}, KaldiFbank(window="hamming"), width="channels"),
    "ecapa_speechbrain": _Model(ECAPA, {"dialect": "speechbrain"}, SpeechBrainFbank(), width="channels"),
    "ge2e": _Model(GE2E, {}, MelSpectrogram(), width="hidden_size"),
    "dnsmos": _Model(DNSMOS, frontend=LogMelSpectrogram(), use="quality"),
    "dnsmos_p808": _Model(
        DNSMOS,
        {"channels": (32, 32, 32, 32, 64), "pooled": (1, 2, 4)},
        LogMelSpectrogram(frame_length_ms=20.0625, frame_shift_ms=10.0, scale="decibel"),
        use="quality",
    ),
}


def model_names(use: Use = "speaker") -> tuple[str, ...]:
    """Names that `Network` accepts, of networks for one use."""
    return tuple(name for name, model in _MODELS.items() if model.use == use)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of speech and the front end that feeds it.

    Attributes:
        name: one of `model_names()` or `model_names("quality")`.
        arguments: the model's own arguments, such as `{"width": 16, "embedding_size": 128}`.
        frontend: what turns its waveforms into features; None stands for the one that published networks of the name
            have, which the attribute then is.

    Raises:
        ValueError: the name or an argument is unknown.
    """

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frontend: FrontEnd = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.name not in _MODELS:
            raise ValueError(f"unknown model {self.name!r}; known: {', '.join(_MODELS)}")
        model = _MODELS[self.name]
        own = {field.name for field in dataclasses.fields(model.module) if field.init}
        fields = own - {*_NOT_ARGUMENTS, *model.fixed}
        unknown = set(self.arguments) - fields
        if unknown:
            raise ValueError(f"{self.name} takes {sorted(fields)}, got {sorted(unknown)}")
        if self.frontend is None:
            object.__setattr__(self, "frontend", model.frontend)

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.arguments.items())), self.frontend))

    def module(self, **overrides: Any) -> nn.Module:
        """The Linen module; `overrides` replace arguments (such as `dtype`) for this instance only."""
        model = _MODELS[self.name]
        return model.module(**{**self.arguments, **model.fixed, **overrides})

    @classmethod
    def of_size(cls, name: str, *, width: int = 0, embedding_size: int = 0) -> "Network":
        """The network of a name in another size, with its usual front end.

        Args:
            name: as above.
            width: channels of a ResNet's first stage or of ECAPA's blocks, units of an LSTM; 0 for the usual.
            embedding_size: dimensions of the embedding; 0 for the usual.

        Raises:
            ValueError: the name is unknown, or the network has no width to set.
        """
        usual = cls(name)
        model, arguments = _MODELS[name], {}
        if width and not model.width:
            raise ValueError(f"{name} has one width only, got width={width}; leave it 0")
        if width:
            arguments[model.width] = width
        if embedding_size:
            arguments["embedding_size"] = embedding_size
        return dataclasses.replace(usual, arguments=arguments)

    @property
    def use(self) -> Use:
        """Whether its outputs are speaker embeddings ("speaker") or one score of quality ("quality")."""
        return _MODELS[self.name].use

    @property
    def embedding_size(self) -> int:
        """Dimensions of an embedding; 1 where it is a score."""
        return int(self.module().embedding_size)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables: `{"params": ..., "batch_stats": ...}`, float32; no statistics are `{}`."""
        features = jnp.zeros((1, 16, self.frontend.num_features))
        return {"batch_stats": {}, **jax.jit(self.module().init)(key, features)}

    def embed(
        self,
        variables: Variables,
        waveform: jax.Array,
        lengths: jax.Array | None = None,
        activations: QuantizedActivations | None = None,
    ) -> jax.Array:
        """Embeddings of a batch of waveforms.

        Args:
            variables: `{"params", "batch_stats"}`.
            waveform: [batch, samples] float in [-1, 1] at the front end's sampling rate, zero padded.
            lengths: [batch] int, valid samples in each row; None when every row is full.
            activations: codes of the layers' inputs; None for float ones.

        Returns:
            [batch, embedding_size] float32, not length normalised.
        """
        return _embed(self, variables, waveform, lengths, activations)

    def to_json(self) -> dict[str, Any]:
        """The description as JSON-compatible fields."""
        return {"name": self.name, "arguments": dict(self.arguments), "frontend": frontend_to_json(self.frontend)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Network":
        """The network that `to_json` described; raises ValueError or KeyError on anything it doesn't know."""
        return cls(fields["name"], dict(fields["arguments"]), frontend_from_json(fields["frontend"]))


@functools.partial(jax.jit, static_argnums=0)
def _embed(
    network: Network,
    variables: Variables,
    waveform: jax.Array,
    lengths: jax.Array | None,
    activations: QuantizedActivations | None,
) -> jax.Array:
    features, mask = network.frontend(waveform, lengths)
    with quantized_activations(activations):
        embeddings: jax.Array = network.module().apply(variables, features, mask)  # type: ignore[assignment]
    return embeddings


def count_parameters(params: Any) -> int:
    """Number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
