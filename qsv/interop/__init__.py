"""Other people's checkpoints as our networks, without PyTorch and without running what is in them."""

from qsv.interop.checkpoint import TORCH_SUFFIXES as TORCH_SUFFIXES
from qsv.interop.checkpoint import read_checkpoint as read_checkpoint
from qsv.interop.data_pickle import UnsafePickleError as UnsafePickleError
from qsv.interop.family import Family as Family
from qsv.interop.importer import FAMILIES as FAMILIES
from qsv.interop.importer import ImportedCheckpoint as ImportedCheckpoint
from qsv.interop.importer import import_checkpoint as import_checkpoint
from qsv.interop.onnx_file import read_onnx_weights as read_onnx_weights
from qsv.interop.state_dict import StateDictError as StateDictError
from qsv.interop.state_dict import variables_from_state_dict as variables_from_state_dict
from qsv.interop.torch_file import read_torch_file as read_torch_file
