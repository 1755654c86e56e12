"""Speaker verification on a device: an ONNX file, a store of voice prints, decisions; needs no JAX."""

from qsv.deploy.runtime.embedder import OnnxEmbedder as OnnxEmbedder
from qsv.deploy.runtime.model_file import ModelFileError as ModelFileError
from qsv.deploy.runtime.speech import SpeechRequirements as SpeechRequirements
from qsv.deploy.runtime.store import StoreError as StoreError
from qsv.deploy.runtime.store import UnknownSpeakerError as UnknownSpeakerError
from qsv.deploy.runtime.store import VoicePrint as VoicePrint
from qsv.deploy.runtime.store import VoicePrintStore as VoicePrintStore
from qsv.deploy.runtime.verifier import Candidate as Candidate
from qsv.deploy.runtime.verifier import Enrolment as Enrolment
from qsv.deploy.runtime.verifier import SpeakerVerifier as SpeakerVerifier
from qsv.deploy.runtime.verifier import Verification as Verification
