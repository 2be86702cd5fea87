"""The devices that kernels are compiled for, and how to compile for one that is not there.

A GPU is described by XLA's `GpuTargetConfigProto`, filled in here from its data sheet; a TPU by the name of a topology.
Set `environment(target)` before JAX is imported. The compilers come with `pip install -e .[check]`.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import math
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

INSTALL = "pip install -e .[check]"
CUDNN = (9, 12)  # the version that JAX's own wheels ask for
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {shared_memory_of_block}
  core_count: {cores}  fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {l2}  clock_rate_ghz: {clock}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """kind: as the driver calls it. cores: streaming multiprocessors, each of so many float32 lanes.

    bandwidth: bytes per second. memory, l2, shared_memory (of a core, and the most that a block can have): bytes.
    clock: GHz.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    memory: int
    bandwidth: int
    l2: int
    shared_memory: int = 233_472
    shared_memory_of_block: int = 232_448
    devices = 1
    platform = "gpu"


@dataclasses.dataclass(frozen=True)
class Tpu:
    """topology: the smallest that the compiler knows; one of its chips is compiled for, or `devices` of a larger one.

    clock: GHz. memory: bytes of a chip that the compiler lets a program have. products: multiply-accumulates in
    bfloat16 that a chip's matrix units do in a cycle, by the peaks of its data sheet (197, 459 and 918 TFLOP/s).
    """

    name: str
    kind: str
    topology: str
    clock: float
    memory: int
    products: int
    devices: int = 1
    platform = "tpu"


TARGETS: dict[str, Gpu | Tpu] = {
    target.name: target
    for target in (
        Gpu("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 84_929_347_584, 3_352_320_000_000, 52_428_800),
        Gpu("h200", "NVIDIA H200", (9, 0), 132, 128, 1.98, 150_754_820_096, 4_800_000_000_000, 62_914_560),
        Gpu("a100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 84_974_239_744, 2_039_000_000_000, 41_943_040,
            shared_memory=167_936, shared_memory_of_block=166_912),
        Gpu("b200", "NVIDIA B200", (10, 0), 148, 128, 1.965, 191_501_959_168, 8_000_000_000_000, 132_644_864),
        Tpu("v5e", "TPU v5 lite", "v5e:2x2", 1.5, 16_911_000_000, 65_536),
        Tpu("v5p", "TPU v5", "v5p:2x2x1", 1.75, 102_789_000_000, 131_072),
        Tpu("v6e", "TPU v6 lite", "v6e:2x2", 1.75, 33_543_000_000, 262_144),
    )
}  # fmt: skip


class MissingCompiler(RuntimeError):
    """What compiling for a target needs is not installed; the message says what to install."""


def nearest(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{what}={name!r}: expected one of {', '.join(known)}.{hint}"


def find(name: str) -> Gpu | Tpu:
    """A target, or all chips of a slice of TPUs, "v5p:2x2x2".

    Raises: ValueError for a name that is not a target's, naming the nearest and listing all, and for no slice's shape.
    """
    name, colon, shape = name.partition(":")
    if name not in TARGETS:
        raise ValueError(nearest("target", name, TARGETS))
    target = TARGETS[name]
    if not colon:
        return target
    axes = shape.split("x")
    expected = target.topology.count("x") + 1 if target.platform == "tpu" else 0
    if len(axes) != expected or not all(axis.isdecimal() and int(axis) > 0 for axis in axes):
        like = f"the chips along {expected} axes, such as {target.topology}" if expected else f"{name}, one device"
        raise ValueError(f"target={name + colon + shape!r}: expected {like}")
    topology = f"{name}:{shape}"
    return dataclasses.replace(target, name=topology, topology=topology, devices=math.prod(map(int, axes)))


def environment(target: Gpu | Tpu) -> dict[str, str]:
    """What has to stand in os.environ when JAX is imported: no accelerator of this machine is started or asked for."""
    of_platform = {
        "gpu": {"CUDA_VISIBLE_DEVICES": ""},
        # no question to the metadata server of a cloud; and where no TPU is opened, no need to be alone with it
        "tpu": {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    }
    return {"JAX_PLATFORMS": "cpu"} | of_platform[target.platform]


def check_compilers(target: Gpu | Tpu) -> None:
    """Raises: MissingCompiler. (Mosaic GPU without libdevice would end the process.)"""
    missing = _missing_of_gpu() if target.platform == "gpu" else _missing_of_tpu()
    if missing:
        raise MissingCompiler(f"compiling for {target.name} needs {' and '.join(missing)}: {INSTALL}")


def _missing_of_tpu() -> list[str]:
    return [] if importlib.util.find_spec("libtpu") else ["libtpu"]


def _missing_of_gpu() -> list[str]:
    jax, missing = importlib.metadata.version("jax"), []
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{package}=={jax}")
        else:
            if installed != jax:
                missing.append(f"{package}=={jax} (that of jax; {installed} is installed)")
    toolkits = [Path(sysconfig.get_path("purelib"), "nvidia/cu13"), *Path("/usr/local").glob("cuda*")]
    for program in ("ptxas", "nvlink"):
        if not shutil.which(program) and not any((root / "bin" / program).exists() for root in toolkits):
            missing.append(f"{program} (nvidia-cuda-nvcc, or a CUDA 13 toolkit)")
    if not any((root / "nvvm/libdevice/libdevice.10.bc").exists() for root in toolkits):
        missing.append("libdevice (nvidia-nvvm, or a CUDA 13 toolkit)")
    return missing


@functools.cache
def mesh(target: Gpu | Tpu) -> Any:
    """A `jax.sharding.Mesh` of the target's devices, axis "data", which can be compiled for and nothing else.

    Raises: ValueError for a slice that the compiler does not know.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies

    if target.platform == "gpu":
        config = GPU_CONFIG.format(**dataclasses.asdict(target), cudnn=CUDNN)
        described = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    else:
        try:
            described = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
        except jax.errors.JaxRuntimeError as error:
            if target == TARGETS.get(target.name):  # its own topology is one: something else is wrong
                raise
            raise ValueError(f"target={target.name!r}: no slice that the compiler knows ({error})") from error
    return jax.sharding.Mesh(np.array(described.devices[: target.devices]), ("data",))


def lower(function: Callable, arguments: tuple, target: Gpu | Tpu) -> Any:
    """The function, lowered for a target on arguments of which shapes and dtypes are known (`jax.ShapeDtypeStruct`).

    Raises: MissingCompiler; and what the function raises.
    """
    import jax

    check_compilers(target)
    here = jax.sharding.NamedSharding(mesh(target), jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), arguments)
    with tracing(target):
        return jax.jit(function).lower(*placed)


def compile(function: Callable, arguments: tuple, target: Gpu | Tpu) -> Any:
    """The function, compiled for a target; see `lower`."""
    return lower(function, arguments, target).compile()


@contextlib.contextmanager
def tracing(target: Gpu | Tpu) -> Iterator[None]:
    """Inside, functions are traced as on the target."""
    import jax

    with jax.sharding.use_abstract_mesh(mesh(target).abstract_mesh), _cudnn_of(target):
        yield


@contextlib.contextmanager
def _cudnn_of(target: Gpu | Tpu) -> Iterator[None]:
    """JAX asks the cuDNN and the GPU of this machine what they can, where the target's count: answered for it.

    A call of cuDNN is part of the compiled program by its name alone; its kernel is built on the device.
    """
    if target.platform != "gpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo

    def capability(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in text.split("."))

    with mock.patch.multiple(
        fused_attention_stablehlo,
        check_cudnn_version=lambda: 10_000 * CUDNN[0] + 100 * CUDNN[1],
        check_compute_capability=lambda text: target.capability >= capability(text),
        is_cuda_compute_capability_equal=lambda text: target.capability == capability(text),
    ):
        yield
