"""What quantization changed: in the scores and decisions of trials."""

from qsv.analysis.scores import DecisionFlips as DecisionFlips
from qsv.analysis.scores import Drift as Drift
from qsv.analysis.scores import decision_flips as decision_flips
from qsv.analysis.scores import drift_by_distance as drift_by_distance
from qsv.analysis.scores import flip_density as flip_density
from qsv.analysis.scores import score_drift as score_drift
