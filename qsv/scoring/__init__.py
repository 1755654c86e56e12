"""Embeddings to scores, and scores to error rates with confidence intervals; knows no model."""

from qsv.scoring.bootstrap import Interval as Interval
from qsv.scoring.bootstrap import ResampledMetrics as ResampledMetrics
from qsv.scoring.bootstrap import bootstrap as bootstrap
from qsv.scoring.bootstrap import paired_bootstrap as paired_bootstrap
from qsv.scoring.bootstrap import resample_metrics as resample_metrics
from qsv.scoring.calibration import AffineCalibration as AffineCalibration
from qsv.scoring.calibration import act_dcf as act_dcf
from qsv.scoring.calibration import bayes_threshold as bayes_threshold
from qsv.scoring.calibration import cllr as cllr
from qsv.scoring.calibration import fit_calibration as fit_calibration
from qsv.scoring.calibration import min_cllr as min_cllr
from qsv.scoring.cascade import Cascade as Cascade
from qsv.scoring.cascade import CascadeOutcome as CascadeOutcome
from qsv.scoring.cascade import bounds_for_escalation as bounds_for_escalation
from qsv.scoring.cascade import bounds_for_flips as bounds_for_flips
from qsv.scoring.cascade import run_cascade as run_cascade
from qsv.scoring.cosine import cosine_scores as cosine_scores
from qsv.scoring.metrics import det_curve as det_curve
from qsv.scoring.metrics import eer as eer
from qsv.scoring.metrics import eer_of_rates as eer_of_rates
from qsv.scoring.metrics import eer_threshold as eer_threshold
from qsv.scoring.metrics import min_dcf as min_dcf
from qsv.scoring.metrics import min_dcf_of_rates as min_dcf_of_rates
from qsv.scoring.normalisation import as_norm as as_norm
from qsv.scoring.normalisation import speaker_means as speaker_means
from qsv.scoring.plots import plot_det as plot_det
