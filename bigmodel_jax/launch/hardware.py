"""What each kind of machine wants in its environment, as data.

The flags are XLA's, NCCL's and libtpu's own, as their documentation recommends them for training:
overlap of collectives with compute, and larger collectives. They change speed, not results.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bigmodel_jax.errors import InputError, nearest

_GPU = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
)
_TPU = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)


@dataclass(frozen=True)
class Hardware:
    """environment: variables of every process. devices: accelerators of one machine.

    accelerator, resource: GKE's node selector value, and the name under which a pod asks for them.
    """

    environment: dict[str, str] = field(default_factory=dict)
    devices: int = 0
    accelerator: str = ""
    resource: str = ""


def _gpu(accelerator: str, devices: int = 8) -> Hardware:
    # Without a tree of NVLink switches on A100, NVLS is simply unused.
    environment = {"XLA_FLAGS": " ".join(_GPU), "NCCL_NVLS_ENABLE": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    return Hardware(environment, devices, accelerator, "nvidia.com/gpu")


def _tpu(accelerator: str, devices: int = 4) -> Hardware:
    return Hardware({"LIBTPU_INIT_ARGS": " ".join(_TPU)}, devices, accelerator, "google.com/tpu")


HARDWARE: dict[str, Hardware] = {
    "cpu": Hardware({"JAX_PLATFORMS": "cpu"}),
    "a100": _gpu("nvidia-tesla-a100"),
    "h100": _gpu("nvidia-h100-80gb"),
    "h200": _gpu("nvidia-h200-141gb"),
    "v4": _tpu("tpu-v4-podslice"),
    "v5e": _tpu("tpu-v5-lite-podslice"),
    "v5p": _tpu("tpu-v5p-slice"),
    "v6e": _tpu("tpu-v6e-slice"),
}


def hardware(name: str) -> Hardware:
    """The row of `name`.

    Raises:
      InputError: unknown, with the nearest.
    """
    if name not in HARDWARE:
        raise InputError(f"hardware '{name}' is not one of {list(HARDWARE)}{nearest(name, HARDWARE)}")
    return HARDWARE[name]
