"""Waveform to features, in jnp."""

from qsv.frontend.fbank import KaldiFbank as KaldiFbank
from qsv.frontend.fbank import fbank as fbank
from qsv.frontend.fbank import mean_normalize as mean_normalize
from qsv.frontend.frontend import FrontEnd as FrontEnd
from qsv.frontend.frontend import frontend_from_json as frontend_from_json
from qsv.frontend.frontend import frontend_to_json as frontend_to_json
from qsv.frontend.log_mel_spectrogram import LogMelSpectrogram as LogMelSpectrogram
from qsv.frontend.mel_spectrogram import MelSpectrogram as MelSpectrogram
from qsv.frontend.spec_augment import SpecAugment as SpecAugment
from qsv.frontend.speechbrain_fbank import SpeechBrainFbank as SpeechBrainFbank
