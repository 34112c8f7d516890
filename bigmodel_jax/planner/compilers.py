"""Where the compilers of other hardware are on this machine, and the devices they describe.

TPU    libtpu: installed (extra "plan"), or in a folder
NVIDIA jax's CUDA plugin, in a folder: installed as a package it would try to start a GPU

The folder is $BIGMODEL_COMPILERS, by default ~/.cache/bigmodel_jax/compilers, with one more folder for each;
`bash launch/compilers` fills it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigmodel_jax.data.storage import cache_root
from bigmodel_jax.errors import InputError
from bigmodel_jax.models import target as kernels
from bigmodel_jax.planner.targets import Target

# XLA's description of a GPU, as text of its proto `GpuTargetConfigProto`. Written by hand from NVIDIA's data sheets
# and tuning guides: what decides memory and collectives is size and count; it has not been compared with the
# description that a real card gives of itself.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""
_AMPERE = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 167936 threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 41943040 clock_rate_ghz: 1.41
  device_memory_size: {memory} shared_memory_per_block_optin: 166912
  cuda_compute_capability {{ major: 8 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""
GPU_CONFIGS = {
    "h100": _HOPPER.format(bandwidth=3352000000000, memory=84978434048, kind="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER.format(bandwidth=4800000000000, memory=150109880320, kind="NVIDIA H200"),
    "a100": _AMPERE.format(bandwidth=2039000000000, memory=85095677952, kind="NVIDIA A100-SXM4-80GB"),
}

CUDNN = 90800
"""Version of cuDNN that GPU programs are compiled for, as in the descriptions above."""
MISSING = {
    "tpu": 'libtpu is not here (pip install "bigmodel_jax[plan]")',
    "gpu": "jax's CUDA compiler is not here (bash launch/compilers)",
}


def folder() -> Path:
    """Where compilers that are not installed as packages are looked for."""
    return Path(os.environ.get("BIGMODEL_COMPILERS") or os.path.join(cache_root(), "compilers"))


def _libtpu() -> Path | None:
    found = importlib.util.find_spec("libtpu")
    places = [Path(found.origin).parent] if found and found.origin else []
    return next((p / "libtpu.so" for p in [folder() / "tpu" / "libtpu", *places] if (p / "libtpu.so").is_file()), None)


def _cuda() -> Path | None:
    place = folder() / "cuda"
    return place if (place / "jax_cuda12_plugin").is_dir() else None


def version(target: Target) -> str:
    """Name and version of the compiler for `target`; "" where it is not on this machine."""
    if target.platform == "tpu" and (library := _libtpu()):
        return f"libtpu {_version(library.parent.parent, 'libtpu')}"
    if target.platform == "gpu" and (place := _cuda()):
        return f"jax-cuda12-pjrt {_version(place, 'jax_cuda12_pjrt')}"
    if target.platform in ("cpu", ""):
        return f"jaxlib {importlib.metadata.version('jaxlib')}"
    return ""


def _version(place: Path, package: str) -> str:
    found = [p.name for p in place.glob(f"{package}-*.dist-info")]
    return re.sub(rf"{package}-(.*)\.dist-info", r"\1", found[0]) if found else "of unknown version"


def environment(target: Target, simulated: bool) -> dict[str, str]:
    """Variables of a process that compiles for `target`, or for as many simulated CPU devices."""
    if target.name == "here":
        return {}
    out = {"JAX_PLATFORMS": "cpu"}
    if simulated or target.platform == "cpu":
        return out | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={target.devices}"}
    if target.platform == "tpu":
        # No question to a metadata server, and no lock against a second compilation.
        out |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LIBRARY_PATH": str(_libtpu())}
    else:
        out |= {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(_cuda())]))}
    return out


@contextlib.contextmanager
def tracing(platform: str) -> Iterator[None]:
    """Inside, steps are traced as on `platform`, whatever runs here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    asked = cudnn.check_cudnn_version
    if platform == "gpu":
        # jax asks the cuDNN library for its version before it writes a call of it; to compile, none is needed.
        cudnn.check_cudnn_version = lambda: CUDNN
    try:
        with kernels.compile_for(platform):
            yield
    finally:
        cudnn.check_cudnn_version = asked


def devices(target: Target, simulated: bool) -> list[Any]:
    """The devices to build a mesh of, in a process with `environment(target, simulated)`.

    Raises:
      InputError: a topology that the compiler does not know.
    """
    import jax
    from jax._src import xla_bridge
    from jax.experimental import topologies

    if simulated or target.platform in ("cpu", ""):
        return jax.devices()
    options: dict[str, Any] = {}
    if target.platform == "tpu":
        name, options = f"{target.chip}:{target.topology}", {"num_slices": target.slices} if target.slices > 1 else {}
        options["wrap"] = target.wrap
        if target.chip == "v4":
            options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    else:
        xla_bridge.discover_pjrt_plugins()
        name, options = "", {"topology": f"1x{target.topology}", "target_config": GPU_CONFIGS[target.chip]}
    platform = {"tpu": "tpu", "gpu": "cuda"}[target.platform]
    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except Exception as error:
        said = str(error).splitlines()[0][:200]
        raise InputError(f"target '{target}': the compiler knows no such topology ({said})") from error
