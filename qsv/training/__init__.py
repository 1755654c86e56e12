"""Training: state, losses, schedules, the sharded step and the loop around it."""

from qsv.training.checkpoints import CheckpointError as CheckpointError
from qsv.training.checkpoints import Checkpoints as Checkpoints
from qsv.training.fit import NonFiniteLossError as NonFiniteLossError
from qsv.training.fit import Periods as Periods
from qsv.training.fit import fit as fit
from qsv.training.input_moments import InputMoments as InputMoments
from qsv.training.input_moments import input_moments as input_moments
from qsv.training.losses import MarginSoftmax as MarginSoftmax
from qsv.training.metrics import MetricWriter as MetricWriter
from qsv.training.metrics import read_metrics as read_metrics
from qsv.training.objectives import Classification as Classification
from qsv.training.objectives import Distillation as Distillation
from qsv.training.objectives import Objective as Objective
from qsv.training.objectives import Outputs as Outputs
from qsv.training.optimizers import Optimizer as Optimizer
from qsv.training.recalibration import recalibrate_batch_stats as recalibrate_batch_stats
from qsv.training.recalibration import shifted_batch_stats as shifted_batch_stats
from qsv.training.schedules import learning_rate_schedule as learning_rate_schedule
from qsv.training.schedules import margin_schedule as margin_schedule
from qsv.training.sharding import data_mesh as data_mesh
from qsv.training.sharding import put_batch as put_batch
from qsv.training.sharding import put_replicated as put_replicated
from qsv.training.state import TrainState as TrainState
from qsv.training.step import Task as Task
from qsv.training.step import make_refresh as make_refresh
from qsv.training.step import make_train_step as make_train_step
