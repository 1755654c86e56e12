"""The GE2E speaker encoder: stacked LSTMs over overlapping windows."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from qsv.frontend.framing import framed

# Keeps the length of a vector that is zero everywhere, and its gradient, finite.
_MIN_SQUARED_LENGTH = 1e-24

# (kernel of the layer's input, kernel of its hidden state, bias)
LSTMWeights = tuple[jax.Array, jax.Array, jax.Array]
# (hidden, cell)
LSTMState = tuple[jax.Array, jax.Array]


class GE2E(nn.Module):
    """LSTM encoder that maps a Mel spectrogram to a speaker embedding of unit length.

    Windows of `window_frames` every `hop_frames` are embedded on their own, the last hidden state giving
    `e = relu(W h + b)`, `e / |e|`; the utterance's embedding is the normalised mean of its windows'. The first
    window always counts. Another, starting at frame s, counts if

        s <= centred - window_frames + hop_frames   and
        centred - 1 - s >= min(min_coverage * window_frames, window_frames - 1)

    where `centred` is the number of valid frames without the tail. Frames past the end are zero.

    Attributes:
        hidden_size: units of a layer.
        num_layers: LSTM layers.
        embedding_size: dimensions of the embedding.
        window_frames: frames of a window.
        hop_frames: frames between the starts of two windows; at most `window_frames`.
        min_coverage: share of a window, from 0 to 1, that the utterance must cover.
        tail_frames: how many of the valid frames are centred past the utterance's end (`MelSpectrogram.tail_frames`).
        dtype: type of the products (bfloat16 for mixed precision); parameters and cell states stay float32.
        batch_axis: without effect, since no statistics are taken over the batch; here because training sets it.

    Raises:
        ValueError: at the first call: a size isn't positive, or hop, coverage or tail is out of range.

    Source: Wan et al. 2018 (arXiv 1710.10467) as built in Resemblyzer's voice_encoder.py, in PyTorch's parameters
    (gates in the order i, f, g, o) but with one bias a layer, the sum of its two. Resemblyzer decides on a window's
    coverage in samples; the same windows are chosen here if `min_coverage * window_frames` is a whole number.
    """

    hidden_size: int = 256
    num_layers: int = 3
    embedding_size: int = 256
    window_frames: int = 160
    hop_frames: int = 77
    min_coverage: float = 0.75
    tail_frames: int = 2
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Embed a batch.

        Args:
            features: [batch, frames, mels] float, as `MelSpectrogram` gives them.
            mask: [batch, frames] bool, true where a frame is valid; padding then never changes an embedding.
            train: without effect.

        Returns:
            [batch, embedding_size] float32, none negative, of unit length.
        """
        self._check()
        if mask is not None:
            features = jnp.where(mask[..., None], features, 0)
        windows, valid = self._windows(features, mask)
        batch, count, frames, mels = windows.shape
        # Time comes first for the scan; the windows of all utterances are one batch.
        sequence = windows.reshape(batch * count, frames, mels).swapaxes(0, 1).astype(self.dtype)
        sizes = [mels] + [self.hidden_size] * (self.num_layers - 1)
        layers = [
            LSTMLayer(self.hidden_size, name=f"lstm{index + 1}").weights(size) for index, size in enumerate(sizes)
        ]
        layers = jax.tree.map(lambda array: array.astype(self.dtype), layers)
        hidden = self.stacked_lstm(sequence, layers)
        wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        embeddings = _unit_length(nn.relu(nn.Dense(self.embedding_size, name="embedding")(wide)))
        embeddings = embeddings.reshape(batch, count, self.embedding_size)
        return _unit_length(jnp.sum(jnp.where(valid[..., None], embeddings, 0), axis=1))

    def stacked_lstm(self, sequence: jax.Array, layers: list[LSTMWeights]) -> jax.Array:
        """`lstm`; a method, so that `nn.intercept_methods` meets the kernels, `lstm1/input/kernel` and so on, here."""
        return lstm(sequence, layers)

    def _windows(self, features: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """[batch, windows, window_frames, mels], zeros past the end, and which of them count, [batch, windows]."""
        batch, frames, _ = features.shape
        last = frames - self.tail_frames + self._slack
        count = jax.core.max_dim(1, last // self.hop_frames + 1)
        padded = jnp.pad(features, ((0, 0), (0, self.window_frames), (0, 0)))
        windows = framed(padded, count, length=self.window_frames, shift=self.hop_frames)
        if mask is None:
            return windows, jnp.ones((batch, count), bool)
        starts = jnp.arange(count) * self.hop_frames
        valid = jnp.sum(mask, axis=1, keepdims=True)
        return windows, (starts == 0) | (starts <= valid - self.tail_frames + self._slack)

    @property
    def _slack(self) -> int:
        """Frames from the centred ones' end to where a window that counts starts at the latest."""
        # A window that another follows counts always; it may lack one frame shift. The small number undoes the
        # rounding of a product that is whole.
        needed = min(math.ceil(self.min_coverage * self.window_frames - 1e-9), self.window_frames - 1)
        return min(self.hop_frames - self.window_frames, -1 - needed)

    def _check(self) -> None:
        for name in ("hidden_size", "num_layers", "embedding_size", "window_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 1 <= self.hop_frames <= self.window_frames:
            raise ValueError(f"hop_frames must be in 1..{self.window_frames} (window_frames), got {self.hop_frames}")
        if not 0 <= self.min_coverage <= 1 or self.tail_frames < 0:
            raise ValueError(
                "min_coverage must be in [0, 1] and tail_frames not negative, "
                f"got {self.min_coverage} and {self.tail_frames}"
            )


class LSTMLayer(nn.Module):
    """Parameters of one LSTM layer: `input/kernel`, `hidden/kernel` and `hidden/bias`, gates in the order i, f, g, o.

    The forget gate's bias starts at 1, the others at 0, so that a fresh cell remembers.

    Attributes:
        hidden_size: units.
    """

    hidden_size: int

    # Not `__call__`, so that weights are never taken for a layer's output where those are captured.
    @nn.compact
    def weights(self, input_size: int) -> LSTMWeights:
        """Kernels [input_size, 4 hidden] and [hidden, 4 hidden], and the bias [4 hidden], float32."""
        gates = 4 * self.hidden_size
        kernel, _ = _Affine(gates, nn.initializers.lecun_normal(), use_bias=False, name="input").weights(input_size)
        recurrent, bias = _Affine(gates, nn.initializers.orthogonal(), name="hidden").weights(self.hidden_size)
        return kernel, recurrent, bias


class _Affine(nn.Module):
    """`nn.Dense`'s parameters without its product, for use inside a scan."""

    features: int
    kernel_init: nn.initializers.Initializer
    use_bias: bool = True

    @nn.compact
    def weights(self, inputs: int) -> tuple[jax.Array, Any]:
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        return kernel, self.param("bias", _remembering, (self.features,)) if self.use_bias else None


def _remembering(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The initial bias of the four gates: 1 for the second, forget, 0 for the others."""
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)


def lstm(sequence: jax.Array, layers: list[LSTMWeights]) -> jax.Array:
    """Last hidden state of stacked LSTMs.

        i, f, g, o = split(x W + h U + b)
        c' = sigmoid(f) c + sigmoid(i) tanh(g)
        h' = sigmoid(o) tanh(c')

    All layers step together, so that nothing but the input is kept for the whole length. With 256 units on a CPU
    that is up to twice as fast as one layer after the other with the products x W of all frames as one, from 16
    sequences on; with 4 it is as fast, and a single one takes half as long again.

    Args:
        sequence: [frames, batch, inputs] float.
        layers: (W [inputs, 4 hidden], U [hidden, 4 hidden], b [4 hidden]) of each layer, in the sequence's dtype.

    Returns:
        [batch, hidden] of the last layer after the last frame, in the sequence's dtype.

    Source: Hochreiter and Schmidhuber 1997 with a forget gate, as in `torch.nn.LSTM`. Cell states are float32 even
    where the sequence is bfloat16.
    """
    return _scan_lstm(sequence, layers, keep=False)[0][-1]


def lstm_sequences(sequence: jax.Array, layers: list[LSTMWeights]) -> list[jax.Array]:
    """`lstm` with the hidden states of all layers after every frame, [frames, batch, hidden] each."""
    return _scan_lstm(sequence, layers, keep=True)[1]


def _scan_lstm(
    sequence: jax.Array, layers: list[LSTMWeights], *, keep: bool
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Hidden states of each layer after the last frame, and where they are kept, after every frame."""
    # Inside shard_map a replicated kernel would be summed over devices in every step of the transposed scan.
    layers = jax.tree.map(functools.partial(_varying_like, sequence), layers)
    wide = jnp.promote_types(sequence.dtype, jnp.float32)

    def start(recurrent: jax.Array) -> LSTMState:
        shape = (sequence.shape[1], recurrent.shape[0])
        hidden, cell = jnp.zeros(shape, sequence.dtype), jnp.zeros(shape, wide)
        return _varying_like(sequence, hidden), _varying_like(sequence, cell)

    def step(states: tuple[LSTMState, ...], frame: jax.Array) -> tuple[tuple[LSTMState, ...], list[jax.Array]]:
        below, stepped = frame, []
        for (kernel, recurrent, bias), (hidden, cell) in zip(layers, states, strict=True):
            gates = below @ kernel + hidden @ recurrent + bias
            i, f, g, o = jnp.split(gates.astype(wide), 4, axis=-1)
            cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
            below = (nn.sigmoid(o) * jnp.tanh(cell)).astype(sequence.dtype)
            stepped.append((below, cell))
        return tuple(stepped), [hidden for hidden, _ in stepped] if keep else []

    states, kept = lax.scan(step, tuple(start(recurrent) for _, recurrent, _ in layers), sequence)
    return [hidden for hidden, _ in states], kept


def _varying_like(like: jax.Array, array: jax.Array) -> jax.Array:
    """The array, marked as differing between the devices of `jax.shard_map` that `like` differs between."""
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(array).manual_axis_type.varying
    return lax.pcast(array, tuple(axes), to="varying") if axes else array


def _unit_length(vectors: jax.Array) -> jax.Array:
    squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * lax.rsqrt(jnp.maximum(squared, _MIN_SQUARED_LENGTH))
