"""Flax Linen networks and pooling; they know nothing of quantized weights."""

from qsv.models.activation_points import ActivationPoints as ActivationPoints
from qsv.models.activation_points import activation_points as activation_points
from qsv.models.attentive_resnet import AttentiveResNet as AttentiveResNet
from qsv.models.campplus import CAMPPlus as CAMPPlus
from qsv.models.df_resnet import DFResNet as DFResNet
from qsv.models.dnsmos import DNSMOS as DNSMOS
from qsv.models.dnsmos import fold_norms as fold_norms
from qsv.models.ecapa import ECAPA as ECAPA
from qsv.models.eres2net import ERes2NetV2 as ERes2NetV2
from qsv.models.ge2e import GE2E as GE2E
from qsv.models.network import Network as Network
from qsv.models.network import count_parameters as count_parameters
from qsv.models.network import model_names as model_names
from qsv.models.pooling import temporal_statistics_pooling as temporal_statistics_pooling
from qsv.models.quantized_activations import OUTPUT as OUTPUT
from qsv.models.quantized_activations import at_points as at_points
from qsv.models.quantized_activations import quantized_activations as quantized_activations
from qsv.models.recomputed_blocks import recomputed_blocks as recomputed_blocks
from qsv.models.resnet import ResNet as ResNet
