"""Descriptions of NVIDIA GPUs for XLA's compiler, from the data sheets."""

from dwt_jax.aot.accelerators import Chip

_HOPPER_TEMPLATE = """gpu_device_info {{
  name: "NVIDIA {name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory:.0f}
  device_address_bits: 64
  runtime_version: "12.8.0"
  driver_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""


def gpu_target_config(chip: Chip) -> str:
    """Return the GpuTargetConfigProto, in text form, of a chip of the Hopper generation."""
    return _HOPPER_TEMPLATE.format(
        name=chip.name.upper(), bandwidth=chip.memory_bandwidth, memory=chip.memory_bytes
    )
