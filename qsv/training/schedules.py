"""Learning-rate and margin schedules: pure functions of the step."""

import math

import jax
import jax.numpy as jnp
import optax


def learning_rate_schedule(
    kind: str, *, peak: float, final: float, num_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """Linear warm-up times a decay over the whole run.

        exponential: peak * (final / peak)^(t / T)
        cosine:      final + (peak - final) (1 + cos(pi t / T)) / 2
        constant:    peak

    Args:
        kind: "exponential", "cosine" or "constant".
        peak: rate that the decay starts from.
        final: rate at the last step.
        num_steps: T.
        warmup_steps: over these the rate is multiplied by (t + 1) / warmup_steps. WeSpeaker's t / warmup_steps would
            waste the first step.

    Returns:
        step -> learning rate.

    Raises:
        ValueError: an unknown kind, or numbers out of range.
    """
    if kind not in ("exponential", "cosine", "constant"):
        raise ValueError(f"schedule must be 'exponential', 'cosine' or 'constant', got {kind!r}")
    if not 0 < final <= peak:
        raise ValueError(f"learning rates need 0 < final <= peak, got final={final}, peak={peak}")
    if not 0 <= warmup_steps <= num_steps:
        raise ValueError(f"warm-up must be within the {num_steps} steps, got {warmup_steps}")

    def schedule(step: jax.Array) -> jax.Array:
        progress = jnp.clip(step / max(num_steps, 1), 0, 1)
        if kind == "exponential":
            rate = peak * jnp.exp(progress * math.log(final / peak))
        elif kind == "cosine":
            rate = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            rate = jnp.full_like(progress, peak)
        return rate * jnp.minimum((step + 1) / max(warmup_steps, 1), 1)

    return schedule


def margin_schedule(*, final: float, rise_start: int, rise_end: int) -> optax.Schedule:
    """Margin 0 before `rise_start`, then rising steeply at first to `final` at `rise_end`.

        m(t) = final * (1 - 1000^(-(t - start) / (end - start)))

    Args:
        final: margin in radians.
        rise_start: first step of the rise.
        rise_end: step from which the margin is final.

    Returns:
        step -> margin.

    Raises:
        ValueError: a negative margin, or a rise that ends before it starts.

    Source: WeSpeaker's MarginScheduler, "exp".
    """
    if final < 0 or not 0 <= rise_start <= rise_end:
        raise ValueError(f"need margin >= 0 and 0 <= start <= end, got {final}, {rise_start}, {rise_end}")

    def schedule(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step - rise_start) / max(rise_end - rise_start, 1), 0, 1)
        risen = final * (1 - jnp.exp(-progress * math.log(1000)))
        return jnp.where(step >= rise_end, final, risen)

    return schedule
