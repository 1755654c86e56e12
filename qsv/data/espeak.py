"""Speech synthesis with eSpeak NG, reproducible from the first sample on."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import tempfile
import threading
from types import TracebackType

import numpy as np

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_CHARS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 3, 4
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """One eSpeak NG engine; use it as a context manager. Calls from several threads wait for each other.

    eSpeak NG keeps its state in global variables of the library, some of it (the phase of flutter, the noise
    generator) never reset, so that what a voice says depends on all that was said before in the process. Each
    engine therefore loads a copy of the library of its own: the same calls give the same samples.

    Raises:
        ImportError: `espeakng-loader`, which carries the library, is not installed.
        RuntimeError: the library does not start.

    Source: https://github.com/espeak-ng/espeak-ng, `speak_lib.h`.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError("synthetic voices need eSpeak NG: pip install 'qsv[demo]'") from error
        self._data_folder = pathlib.Path(espeakng_loader.get_data_path())
        # Windows does not remove a library that is loaded.
        self._folder = tempfile.TemporaryDirectory(prefix="qsv-espeak-", ignore_cleanup_errors=True)
        self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self._folder.name))
        self._library.espeak_Info.restype = ctypes.c_char_p
        self._lock = threading.Lock()
        self._chunks: list[np.ndarray] = []
        # The library keeps the bare pointer: the callback must live as long as the engine.
        self._callback = _SYNTH_CALLBACK(self._collect)
        self.sample_rate_hz: int = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(self._data_folder).encode(), 0
        )
        if self.sample_rate_hz <= 0:
            self._folder.cleanup()
            raise RuntimeError(f"eSpeak NG did not start with the data in {self._data_folder}")
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> Espeak:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine."""
        with self._lock:
            self._library.espeak_Terminate()
            self._folder.cleanup()

    @property
    def version(self) -> str:
        """Version of the library, such as 1.52.0."""
        return self._library.espeak_Info(None).decode().split()[0]

    @property
    def variants(self) -> tuple[str, ...]:
        """Voice variants, `f3` or `klatt2`: each changes formants, breath and voicing of every language."""
        return tuple(sorted(entry.name for entry in (self._data_folder / "voices" / "!v").iterdir()))

    def say(
        self, text: str, *, accent: str, variant: str, rate: int = 175, pitch: int = 50, pitch_range: int = 50
    ) -> np.ndarray:
        """Speaks a text.

        Args:
            text: what to say.
            accent: language of the voice, such as `en-us` or `en-gb-scotland`.
            variant: one of `variants`.
            rate: words a minute, 80..450.
            pitch: 0..100 of the variant's range of pitch.
            pitch_range: 0..100, 0 is monotone.

        Returns:
            `[samples] int16` at `sample_rate_hz`.

        Raises:
            ValueError: there is no such voice, or a parameter is out of range.
        """
        if not (80 <= rate <= 450 and 0 <= pitch <= 100 and 0 <= pitch_range <= 100):
            raise ValueError(
                f"expected rate 80..450, pitch and pitch_range 0..100, got {rate}, {pitch} and {pitch_range}"
            )
        # eSpeak NG falls back on the plain voice where it does not know the variant.
        if variant not in self.variants:
            raise ValueError(f"no voice variant {variant!r}; there are {', '.join(self.variants)}")
        with self._lock:
            if self._library.espeak_SetVoiceByName(f"{accent}+{variant}".encode()) != 0:
                raise ValueError(f"eSpeak NG has no voice {accent!r}")
            for parameter, value in (
                (_PARAMETER_RATE, rate),
                (_PARAMETER_PITCH, pitch),
                (_PARAMETER_RANGE, pitch_range),
            ):
                self._library.espeak_SetParameter(parameter, value, 0)
            self._chunks = []
            encoded = text.encode()
            status = self._library.espeak_Synth(
                encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, _CHARS_UTF8, None, None
            )
            self._library.espeak_Synchronize()
            if status != 0 or not self._chunks:
                raise RuntimeError(f"eSpeak NG said nothing for {text!r} (status {status})")
            return np.concatenate(self._chunks)

    def _collect(self, samples: ctypes._Pointer, count: int, events: int | None) -> int:
        """Takes what the engine made; 0 asks it to go on."""
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0
