"""From trained parameters to one small file, and from that file to embeddings."""

from qsv.deploy.cascade import CascadeVerifier as CascadeVerifier
from qsv.deploy.cascade import Decision as Decision
from qsv.deploy.cascade import StageUse as StageUse
from qsv.deploy.cascade import load_cascade as load_cascade
from qsv.deploy.cascade import save_cascade as save_cascade
from qsv.deploy.embedder import Embedder as Embedder
from qsv.deploy.embedder import load as load
from qsv.deploy.embedder import save as save
from qsv.deploy.integer import IntegerLayer as IntegerLayer
from qsv.deploy.integer import IntegerNetwork as IntegerNetwork
from qsv.deploy.integer import integer_layer as integer_layer
from qsv.deploy.packed_file import PackedModel as PackedModel
from qsv.deploy.packed_file import describe_plan as describe_plan
from qsv.deploy.packed_file import is_packed as is_packed
from qsv.deploy.packed_file import load_packed as load_packed
from qsv.deploy.packed_file import save_packed as save_packed
from qsv.deploy.quality import QualityEstimator as QualityEstimator
from qsv.deploy.size_report import SizeReport as SizeReport
from qsv.deploy.size_report import TensorSize as TensorSize
from qsv.deploy.size_report import file_report as file_report
from qsv.deploy.size_report import plan_report as plan_report
from qsv.deploy.size_report import plan_table as plan_table
from qsv.deploy.size_report import size_report as size_report
