"""From absl flags to one frozen config: the fields of a config declare the flags."""

import dataclasses
import json
import os
import pathlib
import platform
import sys
import typing
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
from absl import app, flags, logging

from qsv.data import AudioError, BadFilesError
from qsv.deploy.atomic_write import write_atomically
from qsv.training import CheckpointError, NonFiniteLossError

# Errors whose message says what to do; a traceback would only hide it.
_EXPECTED_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    FloatingPointError,
    AudioError,
    BadFilesError,
    CheckpointError,
    NonFiniteLossError,
)


def setting(
    default: Any,
    help_line: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: Any = None,
    incidental: bool = False,
) -> Any:
    """A config field that becomes a flag of the same name, or a config within it.

    Args:
        default: its value.
        help_line: unit and meaning.
        choices: of an enum.
        minimum: least value.
        incidental: it has no part in what a run makes, such as how often it logs: what was made with one value is
            resumed and reused with another.
    """
    metadata = {"help": help_line, "choices": choices, "minimum": minimum, "incidental": incidental}
    return dataclasses.field(default=default, metadata=metadata)


def launch(config_type: type, run: Callable[[Any], object], *, cpu_devices: int = 0) -> None:
    """Define the flags of a config, parse them, and run the experiment; `cpu_devices` is that flag's default."""
    _use_huge_pages()
    define_flags(config_type())
    define_launch_flags(cpu_devices)

    def main(arguments: list[str]) -> int | None:
        if len(arguments) > 1 and "arguments" not in {f.name for f in dataclasses.fields(config_type)}:
            print(f"error: unexpected arguments {arguments[1:]}; see --help", file=sys.stderr)
            return 2
        if flags.FLAGS.cpu_devices:
            jax.config.update("jax_num_cpu_devices", flags.FLAGS.cpu_devices)
        logging.set_verbosity(logging.WARNING)
        try:
            _join_processes()
            run(config_from_flags(config_type, arguments[1:]))
        except _EXPECTED_ERRORS as error:
            if flags.FLAGS.debug:
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1
        return None

    app.run(main)


def define_launch_flags(cpu_devices: int) -> None:
    """The flags that every experiment has, apart from those of its config."""
    flags.DEFINE_bool("debug", False, "Show the traceback of an expected error, such as a missing file.")
    flags.DEFINE_integer(
        "cpu_devices",
        cpu_devices,
        "Virtual devices to split the CPU into, which share a batch; 0 leaves the choice to JAX.",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0 where several processes train together, each started with the same command; auto where "
        "the cluster tells them (Slurm, TPU). Their --workdir must be one shared folder.",
    )
    flags.DEFINE_integer("processes", 1, "How many processes train together, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process", 0, "Which of them this is.", lower_bound=0)


def _join_processes() -> None:
    """Wait for the other processes of the training, where there are any."""
    coordinator, processes, process = (flags.FLAGS[name].value for name in ("coordinator", "processes", "process"))
    if process >= processes:
        raise ValueError(f"--process must be below --processes={processes}, got {process}")
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        jax.distributed.initialize(coordinator, processes, process)
    elif processes > 1:
        raise ValueError("--processes needs --coordinator, the HOST:PORT of process 0")


def _use_huge_pages() -> None:
    """Start the process again with glibc's huge pages: training on a CPU is up to 1.4 times faster with them.

    The allocator reads the variable when a process starts, so it can't be set later.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def define_flags(config: Any) -> None:
    """One flag for each field of a config, those of nested configs included; its values are the defaults."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, default, options = hints[field.name], getattr(config, field.name), field.metadata
        if dataclasses.is_dataclass(default):
            define_flags(default)
        elif field.name == "arguments":
            continue
        elif options["choices"]:
            flags.DEFINE_enum(field.name, default, list(options["choices"]), options["help"])
        elif kind is bool:
            flags.DEFINE_bool(field.name, default, options["help"])
        elif kind is int:
            flags.DEFINE_integer(field.name, default, options["help"], lower_bound=options["minimum"])
        elif kind is float:
            flags.DEFINE_float(field.name, default, options["help"], lower_bound=options["minimum"])
        elif typing.get_origin(kind) is tuple:
            flags.DEFINE_multi_string(field.name, list(default), options["help"] + " May be repeated.")
        else:
            flags.DEFINE_string(field.name, default, options["help"])


def config_from_flags(config_type: type, arguments: Sequence[str] = ()) -> Any:
    """The config that the parsed flags describe; `arguments` are what remains of the command line."""
    hints = typing.get_type_hints(config_type)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            values[field.name] = config_from_flags(kind)
        elif field.name == "arguments":
            values[field.name] = tuple(arguments)
        else:
            value = flags.FLAGS[field.name].value
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return config_type(**values)


def require(**values: Any) -> None:
    """Raise ValueError for settings that have no default and weren't given."""
    missing = [f"--{name}" for name, value in values.items() if value in (None, "", ())]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given; see --help")


def write_run_record(workdir: str | os.PathLike[str], experiment: str, config: Any, **more: Any) -> None:
    """Write `run.json`: the command's settings, versions and machine, and what else is given."""
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "experiment": experiment,
        "config": dataclasses.asdict(config),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "machine": machine(),
        **more,
    }
    write_json(folder / "run.json", record)


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
    }


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON so that a kill never leaves half of it."""
    write_atomically(path, (json.dumps(value, indent=2, default=str) + "\n").encode())
