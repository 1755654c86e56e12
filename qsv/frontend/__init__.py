"""Waveform to features, in jnp."""

from qsv.frontend.fbank import FrontEnd as FrontEnd
from qsv.frontend.fbank import fbank as fbank
from qsv.frontend.fbank import mean_normalize as mean_normalize
from qsv.frontend.spec_augment import SpecAugment as SpecAugment
