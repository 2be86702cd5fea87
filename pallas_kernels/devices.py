"""Which device a call is traced for, and how to trace kernels for one that is not there."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu, tpu


@dataclasses.dataclass(frozen=True)
class Device:
    """platform: "cpu", "gpu" or "tpu". kind: the driver's name ("NVIDIA H200", "TPU v5 lite"); "" if interpreted."""

    platform: str
    kind: str
    interpreted: bool = False

    @property
    def copies_tiles(self) -> bool:
        """Whether it is a GPU with the unit that copies tiles to shared memory (TMA): Hopper, and Blackwell's B200."""
        return self.hopper or (self.platform == "gpu" and any(name in self.kind for name in ("B100", "B200", "B300")))

    @property
    def hopper(self) -> bool:
        """Whether kernels for Hopper run here (its matrix instructions are not those of the generations beside it)."""
        names = ("H100", "H200", "H800", "H20", "GH200")
        return self.platform == "gpu" and (self.interpreted or any(name in self.kind for name in names))


_interpreted: contextvars.ContextVar[str | None] = contextvars.ContextVar("interpreted", default=None)


def current() -> Device:
    """The device of the abstract mesh in use (a compilation for hardware that is not here), else JAX's default one
    (`jax.default_device`, if that is set)."""
    if _interpreted.get() is not None:
        return Device(_interpreted.get(), "", interpreted=True)
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None:
        default = jax.config.jax_default_device  # a device, the name of a platform, or None
        device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
        return Device(device.platform, device.device_kind)
    kind = abstract.device_kind
    return Device("tpu" if "TPU" in kind else "cpu" if kind.lower() == "cpu" else "gpu", kind)


@contextlib.contextmanager
def interpreting(platform: str, **options: bool) -> Iterator[None]:
    """Inside, calls are traced for a Hopper GPU ("gpu") or a TPU ("tpu"), and their kernels are simulated on the CPU.

    Memory spaces, copies, barriers and semaphores are simulated, fresh memory holds NaN; options are those of JAX's
    interpreters, such as `detect_races=True`. Trace inside: a function that was jitted outside is not traced anew.
    """
    if platform not in ("gpu", "tpu"):
        raise ValueError(f"platform={platform!r}: expected 'gpu' or 'tpu'")
    if platform == "gpu":
        simulated = mosaic_gpu.force_gpu_interpret_mode(mosaic_gpu.InterpretGPUParams(**options))
    else:
        simulated = tpu.force_tpu_interpret_mode(tpu.InterpretParams(**options))
    token = _interpreted.set(platform)
    try:
        with simulated:
            yield
    finally:
        _interpreted.reset(token)
