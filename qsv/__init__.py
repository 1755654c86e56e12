"""qsv: speaker-verification networks small enough for a phone, and what it cost."""

from qsv.quant import AdaptiveBinary as AdaptiveBinary
from qsv.quant import AdditivePowerOfTwo as AdditivePowerOfTwo
from qsv.quant import KMeans as KMeans
from qsv.quant import Plan as Plan
from qsv.quant import PowerOfTwo as PowerOfTwo
from qsv.quant import QTensor as QTensor
from qsv.quant import Quantizer as Quantizer
from qsv.quant import QuantizerState as QuantizerState
from qsv.quant import Rule as Rule
from qsv.quant import StaticBinary as StaticBinary
from qsv.quant import Uniform as Uniform
from qsv.quant import additive_power_of_two_codebook as additive_power_of_two_codebook
from qsv.quant import dequantize as dequantize
from qsv.quant import fake_quantize as fake_quantize
from qsv.quant import init as init
from qsv.quant import kmeans_codebook as kmeans_codebook
from qsv.quant import pack_bits as pack_bits
from qsv.quant import power_of_two_codebook as power_of_two_codebook
from qsv.quant import quantize as quantize
from qsv.quant import refresh as refresh
from qsv.quant import resolve as resolve
from qsv.quant import uniform_codebook as uniform_codebook
from qsv.quant import unpack_bits as unpack_bits
