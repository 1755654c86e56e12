"""What quantization changed: in the weights, the layers' outputs, the scores and the decisions."""

from qsv.analysis.correlation import RankCorrelation as RankCorrelation
from qsv.analysis.correlation import rank_correlation as rank_correlation
from qsv.analysis.layers import Distortion as Distortion
from qsv.analysis.layers import LayerDrift as LayerDrift
from qsv.analysis.layers import LayerWeights as LayerWeights
from qsv.analysis.layers import activation_drift as activation_drift
from qsv.analysis.layers import grouped_paths as grouped_paths
from qsv.analysis.layers import packed_weight_statistics as packed_weight_statistics
from qsv.analysis.layers import smoothness as smoothness
from qsv.analysis.layers import weight_statistics as weight_statistics
from qsv.analysis.layers import with_layers_of as with_layers_of
from qsv.analysis.plots import plot_flips as plot_flips
from qsv.analysis.plots import plot_layers as plot_layers
from qsv.analysis.plots import plot_score_drift as plot_score_drift
from qsv.analysis.plots import plot_trade_off as plot_trade_off
from qsv.analysis.plots import plot_weight_histograms as plot_weight_histograms
from qsv.analysis.probing import Probe as Probe
from qsv.analysis.probing import ProbeResult as ProbeResult
from qsv.analysis.probing import probe as probe
from qsv.analysis.scores import DecisionFlips as DecisionFlips
from qsv.analysis.scores import Drift as Drift
from qsv.analysis.scores import decision_flips as decision_flips
from qsv.analysis.scores import drift_by_distance as drift_by_distance
from qsv.analysis.scores import flip_density as flip_density
from qsv.analysis.scores import score_drift as score_drift
