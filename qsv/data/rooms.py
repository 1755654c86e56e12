"""Impulse responses of simulated rooms, by the image source method."""

from __future__ import annotations

import numpy as np

from qsv.data.augmentation import ImpulseResponses

_WALL_DISTANCE_METRES = 0.5
_SHORTEST_DISTANCE_METRES = 0.3
_MAX_FAILURES = 100


def simulate_room_impulse_responses(
    count: int,
    seed: int,
    *,
    sample_rate_hz: int = 16000,
    room_metres: tuple[tuple[float, float], tuple[float, float], tuple[float, float]] = (
        (3.0, 10.0),
        (3.0, 8.0),
        (2.5, 4.0),
    ),
    rt60_seconds: tuple[float, float] = (0.15, 0.7),
    max_order: int = 20,
) -> ImpulseResponses:
    """Simulates random shoebox rooms with a random source and microphone in each.

    Args:
        count: how many.
        seed: of the rooms; the same seed gives the same responses.
        sample_rate_hz: sample rate.
        room_metres: range of length, width and height.
        rt60_seconds: range of the reverberation time that the walls' absorption is set for, by Sabine's
            formula. Rooms that cannot have the time that was drawn (too large: their walls would have to
            absorb more than all) are drawn again.
        max_order: most reflections on one path. The tail of a hard room is cut short by it; it bounds the
            computing time, which grows with its cube.

    Returns:
        A source for `Augmenter`, of arrays `[taps] float32` with a largest tap of 1.

    Raises:
        ImportError: pyroomacoustics is not installed (`pip install 'qsv[rooms]'`).
        ValueError: `count` is not positive, or no room of these ranges can have such a reverberation time.

    Source: Allen and Berkley, "Image method for efficiently simulating small-room acoustics", 1979, as
    implemented in pyroomacoustics.
    """
    try:
        import pyroomacoustics
    except ImportError as error:
        raise ImportError("simulated rooms need pyroomacoustics: pip install 'qsv[rooms]'") from error
    if count < 1:
        raise ValueError(f"expected count >= 1, got {count}")
    lows, highs = np.array(room_metres).T
    if np.any(lows <= 2 * _WALL_DISTANCE_METRES) or np.any(lows > highs):
        raise ValueError(f"expected (low, high) above {2 * _WALL_DISTANCE_METRES} m for each side, got {room_metres}")
    rng = np.random.default_rng(seed)
    responses: list[np.ndarray] = []
    failures = 0
    while len(responses) < count:
        if failures == _MAX_FAILURES:
            raise ValueError(
                f"{failures} rooms in a row of {room_metres} m were too small to place a source in, or "
                f"too large for a reverberation time of {rt60_seconds} s"
            )
        failures += 1
        size = rng.uniform(lows, highs)
        source, microphone = rng.uniform(_WALL_DISTANCE_METRES, size - _WALL_DISTANCE_METRES, size=(2, 3))
        rt60 = rng.uniform(*rt60_seconds)
        if np.linalg.norm(source - microphone) < _SHORTEST_DISTANCE_METRES:
            continue
        try:
            absorption, order = pyroomacoustics.inverse_sabine(rt60, size)
        except ValueError:
            continue
        failures = 0
        room = pyroomacoustics.ShoeBox(
            size,
            fs=sample_rate_hz,
            materials=pyroomacoustics.Material(absorption),
            max_order=min(order, max_order),
        )
        room.add_source(source)
        room.add_microphone(microphone)
        room.compute_rir()
        response = np.asarray(room.rir[0][0], np.float32)
        responses.append(response / np.max(np.abs(response)))
    return ImpulseResponses(arrays=tuple(responses))
