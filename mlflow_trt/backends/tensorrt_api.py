"""The part of TensorRT's Python API that this package uses, as types.

TensorRT ships no type stubs, and its distributions (10.12 and later, 11, TensorRT-RTX) differ. Everything that touches
TensorRT is typed against these protocols, so the type checker refuses a name that is not listed here, and a test looks
up each listed name in the bindings of every supported release. Protocols are named after TensorRT's own classes; what
only TensorRT-RTX has stands in the protocols whose names begin with `Rtx`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Enumerator(Protocol):
    """One value of a TensorRT enumeration."""

    @property
    def name(self) -> str: ...
    def __int__(self) -> int: ...


class IHostMemory(Protocol):
    """Memory that TensorRT owns; supports the buffer protocol."""

    nbytes: int


# ---- building ------------------------------------------------------------------------------------------------------


class ITensor(Protocol):
    name: str
    shape: Sequence[int]
    dtype: Enumerator
    is_shape_tensor: bool


class ILayer(Protocol):
    type: Enumerator
    name: str
    num_inputs: int
    num_outputs: int

    def get_input(self, index: int) -> ITensor | None: ...
    def get_output(self, index: int) -> ITensor: ...


class INetworkDefinition(Protocol):
    num_inputs: int
    num_outputs: int
    num_layers: int

    def get_layer(self, index: int) -> ILayer: ...
    def get_input(self, index: int) -> ITensor: ...
    def get_output(self, index: int) -> ITensor: ...


class IPluginRegistry(Protocol):
    def load_library(self, plugin_path: str) -> object | None: ...


class IOptimizationProfile(Protocol):
    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None: ...
    def set_shape_input(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None: ...


class ITimingCache(Protocol):
    def serialize(self) -> IHostMemory: ...
    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool: ...


class IBuilderConfig(Protocol):
    builder_optimization_level: int
    avg_timing_iterations: int
    hardware_compatibility_level: Enumerator
    progress_monitor: IProgressMonitor
    profiling_verbosity: Enumerator

    def set_flag(self, flag: Enumerator) -> None: ...
    def clear_flag(self, flag: Enumerator) -> None: ...
    def set_memory_pool_limit(self, pool: Enumerator, pool_size: int) -> None: ...
    def set_tactic_sources(self, tactic_sources: int) -> bool: ...
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache: ...


class RtxIBuilderConfig(IBuilderConfig, Protocol):
    num_compute_capabilities: int

    def set_compute_capability(self, compute_capability: Enumerator, index: int) -> bool: ...


class Builder(Protocol):
    def create_network(self, flags: int) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None: ...


class ParserError(Protocol):
    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    num_errors: int

    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class ILogger(Protocol):
    def log(self, severity: Enumerator, message: str) -> None: ...


class IProgressMonitor(Protocol):
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool: ...
    def phase_finish(self, phase_name: str) -> None: ...


# ---- running -------------------------------------------------------------------------------------------------------


class IProfiler(Protocol):
    def report_layer_time(self, layer_name: str, ms: float) -> None: ...


class EngineInspector(Protocol):
    execution_context: IExecutionContext

    def get_engine_information(self, format: Enumerator) -> str: ...


class IExecutionContext(Protocol):
    profiler: IProfiler

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_output_allocator(self, name: str, output_allocator: Any) -> bool: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class Refitter(Protocol):
    def get_missing_weights(self) -> Sequence[str]: ...
    def refit_cuda_engine(self) -> bool: ...


class OnnxParserRefitter(Protocol):
    num_errors: int

    def refit_from_file(self, model_file: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class RtxIRuntimeCache(Protocol):
    def serialize(self) -> IHostMemory: ...
    def deserialize(self, blob: bytes) -> bool: ...


class RtxIRuntimeConfig(Protocol):
    dynamic_shapes_kernel_specialization_strategy: Enumerator
    cuda_graph_strategy: Enumerator

    def set_execution_context_allocation_strategy(self, strategy: Enumerator) -> None: ...
    def create_runtime_cache(self) -> RtxIRuntimeCache: ...
    def set_runtime_cache(self, cache: RtxIRuntimeCache) -> bool: ...


class ICudaEngine(Protocol):
    num_io_tensors: int
    num_optimization_profiles: int
    weight_streaming_budget_v2: int

    def get_weight_streaming_automatic_budget(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Enumerator: ...
    def get_tensor_dtype(self, name: str) -> Enumerator: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def get_tensor_location(self, name: str) -> Enumerator: ...
    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Sequence[int]]: ...
    def get_tensor_profile_values(self, profile_index: int, name: str) -> Sequence[Sequence[int]]: ...
    def create_engine_inspector(self) -> EngineInspector: ...
    def create_execution_context(self, runtime_config: Any = None) -> IExecutionContext | None: ...


class RtxICudaEngine(ICudaEngine, Protocol):
    def create_runtime_config(self) -> RtxIRuntimeConfig: ...


class Runtime(Protocol):
    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None: ...


class RtxRuntime(Runtime, Protocol):
    def get_engine_validity(self, buffer: bytes) -> tuple[Enumerator, int]: ...


# ---- the module ----------------------------------------------------------------------------------------------------


class Severity(Protocol):
    INTERNAL_ERROR: Enumerator
    ERROR: Enumerator
    WARNING: Enumerator
    INFO: Enumerator
    VERBOSE: Enumerator


class BuilderFlag(Protocol):
    TF32: Enumerator
    VERSION_COMPATIBLE: Enumerator
    DISABLE_TIMING_CACHE: Enumerator
    SPARSE_WEIGHTS: Enumerator
    REFIT: Enumerator
    STRIP_PLAN: Enumerator
    WEIGHT_STREAMING: Enumerator


class MemoryPoolType(Protocol):
    WORKSPACE: Enumerator
    TACTIC_DRAM: Enumerator
    TACTIC_SHARED_MEMORY: Enumerator


class ProfilingVerbosity(Protocol):
    NONE: Enumerator
    LAYER_NAMES_ONLY: Enumerator
    DETAILED: Enumerator


class NetworkDefinitionCreationFlag(Protocol):
    STRONGLY_TYPED: Enumerator


class HardwareCompatibilityLevel(Protocol):
    NONE: Enumerator
    AMPERE_PLUS: Enumerator
    SAME_COMPUTE_CAPABILITY: Enumerator


class LayerInformationFormat(Protocol):
    JSON: Enumerator


class TensorIOMode(Protocol):
    INPUT: Enumerator
    OUTPUT: Enumerator


class TensorLocation(Protocol):
    DEVICE: Enumerator
    HOST: Enumerator


class RtxEngineValidity(Protocol):
    VALID: Enumerator
    SUBOPTIMAL: Enumerator
    INVALID: Enumerator


class RtxDynamicShapesKernelSpecializationStrategy(Protocol):
    LAZY: Enumerator
    EAGER: Enumerator
    NONE: Enumerator


class RtxCudaGraphStrategy(Protocol):
    DISABLED: Enumerator


class ExecutionContextAllocationStrategy(Protocol):
    USER_MANAGED: Enumerator
