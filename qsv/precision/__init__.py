"""Which layer gets how many bits, and in which order."""

from qsv.precision.allocation import Allocation as Allocation
from qsv.precision.allocation import Budget as Budget
from qsv.precision.allocation import Choice as Choice
from qsv.precision.allocation import InfeasibleBudgetError as InfeasibleBudgetError
from qsv.precision.allocation import Layer as Layer
from qsv.precision.allocation import allocate as allocate
from qsv.precision.allocation import four_section_search as four_section_search
from qsv.precision.allocation import pareto_front as pareto_front
from qsv.precision.hessian import Loss as Loss
from qsv.precision.hessian import TraceEstimate as TraceEstimate
from qsv.precision.hessian import hessian_traces as hessian_traces
from qsv.precision.hessian import hessian_vector_product as hessian_vector_product
from qsv.precision.hessian import largest_relative_error as largest_relative_error
