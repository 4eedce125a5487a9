"""What is served and how: the model's own numbers (ModelConfig) and the operator's (EngineConfig)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jaxserve.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
KvCacheDtype = Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"]
# Other names of dtypes, which vLLM takes too.
OTHER_DTYPES: Mapping[str, Dtype | None] = {"auto": None, "half": "float16", "float": "float32"}
LoadFormat = Literal["auto", "safetensors", "gguf", "orbax", "dummy"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training context.

    `llama3` follows the scheme of Llama 3.1's reference code, `linear` divides positions by `factor`,
    `yarn` is arXiv:2309.00071.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"model config: rope scaling by {self.factor} from original_max_position_embeddings "
                f"{self.original_max_position_embeddings}; both must be at least 1"
            )
        if self.factor * self.original_max_position_embeddings >= 2**31:
            raise ConfigError(
                f"model config: rope scaling by the factor {self.factor} makes "
                f"{self.original_max_position_embeddings} positions (original_max_position_embeddings) more than 2**31"
            )
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise ConfigError(
                    f"model config: {name} of yarn is {value}; it must be above 0, and below 1e6"
                )


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts: several feed-forwards side by side, of which every token takes its own few."""

    num_experts: int  # E
    num_per_token: int
    intermediate_size: int  # F of one expert
    renormalize: bool  # whether the weights of a token's experts are scaled to a sum of 1
    layers: tuple[bool, ...]  # whether each layer has experts, or else a feed-forward like other models

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_per_token", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model config: {name} is {getattr(self, name)}; it must be at least 1")
        if self.num_per_token > self.num_experts:
            raise ConfigError(
                f"model config: {self.num_per_token} experts a token, but there are {self.num_experts}"
            )


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower of a model that sees, and how its language model places images."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int  # pixels, across and down
    temporal_patch_size: int  # frames of a patch; an image is as many copies of itself
    num_channels: int
    merge_size: int  # patches, across and down, that become one token
    window_size: int | None  # patches, across and down, that see each other where layers have windows
    full_attention_layers: tuple[int, ...]  # layers without windows
    mrope_sections: tuple[int, int, int]  # rotated pairs of a head that turn by time, row and column
    image_token_id: int  # stands in the prompt where an image's tokens go
    image_marker_ids: tuple[int, ...]  # what a chat template writes for an image, with image_token_id once

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "patch_size",
            "temporal_patch_size",
            "merge_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"model config: vision {name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.hidden_size % (4 * self.num_heads):
            raise ConfigError(
                f"model config: vision hidden_size {self.hidden_size} is not a multiple of 4 * num_heads "
                f"({4 * self.num_heads}), as rotation by row and column wants it"
            )
        if self.window_size is not None and (self.window_size < 1 or self.window_size % self.merge_size):
            raise ConfigError(
                f"model config: vision windows of {self.window_size} patches are not whole groups of {self.merge_size}"
            )
        outside = [i for i in self.full_attention_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ConfigError(
                f"model config: full attention in vision layers {outside}, of {self.num_layers} layers"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merged_patches(self) -> int:
        """Patches that become one token."""
        return self.merge_size**2

    @property
    def frame_values(self) -> int:
        """Numbers of one patch in one frame."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers a checkpoint decides.  None of them has a default: the config reader fills all."""

    family: str  # key of jaxserve.models.registry: "llama", "mistral", "qwen2", "qwen3", …
    num_layers: int
    hidden_size: int  # D
    intermediate_size: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    vocab_size: int  # V
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    layer_windows: tuple[int | None, ...]  # sliding window of each layer in tokens, None for full attention
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hidden_act: Literal["silu"]
    experts: ExpertsConfig | None  # of models that have them in some layers
    vision: VisionConfig | None  # of models that see

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model config: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.rms_norm_eps < 1:
            raise ConfigError(
                f"model config: rms_norm_eps is {self.rms_norm_eps}; it must be at least 0, and below 1"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model config: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if len(self.layer_windows) != self.num_layers:
            raise ConfigError(
                f"model config: {len(self.layer_windows)} layer_windows for {self.num_layers} layers"
            )
        if self.experts is not None and len(self.experts.layers) != self.num_layers:
            raise ConfigError(
                f"model config: experts.layers speaks of {len(self.experts.layers)} layers of {self.num_layers}"
            )
        if self.vision is not None and 2 * sum(self.vision.mrope_sections) != self.head_dim:
            raise ConfigError(
                f"model config: mrope_section {list(self.vision.mrope_sections)} does not sum up to half of head_dim "
                f"({self.head_dim})"
            )

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The experts of a layer, None if it has a feed-forward like other models'."""
        return self.experts if self.experts is not None and self.experts.layers[layer] else None


@dataclass(frozen=True, slots=True)
class ImageProcessorConfig:
    """How an image becomes patches, by the rules of transformers' Qwen2VLImageProcessor; a checkpoint decides it."""

    patch_size: int  # pixels of a patch's side
    temporal_patch_size: int  # frames of a patch: an image is repeated as often
    merge_size: int  # patches down and across that become one token
    min_pixels: int  # smaller images are enlarged
    max_pixels: int  # larger ones are shrunk
    rescale_factor: float
    image_mean: tuple[float, float, float]  # of red, green and blue, after rescaling
    image_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"image processor: {name} is {getattr(self, name)}; it must be at least 1")
        if self.max_pixels < self.min_pixels:
            raise ConfigError(
                f"image processor: max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}"
            )
        # Bytes become (byte * rescale_factor - mean) / std in float32, which these keep from infinities.
        for name, values in (("rescale_factor", (self.rescale_factor,)), ("image_std", self.image_std)):
            if not all(1e-6 <= value <= 1e6 for value in values):
                raise ConfigError(
                    f"image processor: {name} is {getattr(self, name)}; it must be from 1e-6 to 1e6"
                )
        if not all(abs(value) <= 1e6 for value in self.image_mean):
            raise ConfigError(
                f"image processor: image_mean is {self.image_mean}; it must be from -1e6 to 1e6"
            )

    @property
    def token_pixels(self) -> int:
        """Pixels of the side of the square that one token stands for."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The operator's choices.  `None` means: decided at start from the model and the device, and printed."""

    model: str  # directory, .gguf file, or hub name
    tokenizer: str | None = None  # where to read the tokenizer from if not from the model
    revision: str | None = None  # of a model on the hub: a branch, a tag or a commit
    load_format: LoadFormat = "auto"
    # float32 on CPU, bfloat16 on accelerators.  OTHER_DTYPES and torch's own are taken, and become one of these.
    dtype: Dtype | None = None
    kv_cache_dtype: KvCacheDtype = "auto"  # of KV pages; auto: the model's dtype, fp8: fp8_e4m3
    max_model_len: int | None = None  # tokens of prompt + answer
    page_size: int | None = None  # tokens of a KV page: 64 on GPUs, 16 elsewhere
    max_num_seqs: int | None = None  # sequences in one step
    max_num_batched_tokens: int | None = None  # token budget of one step
    gpu_memory_utilization: float = 0.9  # share of device memory for weights, activations and KV pages
    kv_cache_memory: int | None = None  # bytes for KV pages; overrides gpu_memory_utilization
    enable_prefix_caching: bool = True
    forbid_recompile: bool = False  # a shape outside the compiled lattice is an error
    compile_cache_dir: str | None = None  # default ~/.cache/jaxserve/xla; "" turns the disk cache off
    seed: int | None = None  # makes requests without a seed reproducible too
    max_logprobs: int = 20
    tensor_parallel_size: int = 1  # devices that share the model
    enable_expert_parallel: bool = False  # each of them has experts of its own, not a share of every expert
    data_parallel_size: int = 1  # engines side by side, each with devices and pages of its own
    nnodes: int = 1  # hosts over which one engine's devices lie, the same number on each
    node_rank: int = 0  # which of them this is; 0 plans and answers
    master_addr: str | None = None  # where host 0 is, as the others see it
    master_port: int = 29501  # of JAX's coordinator there; plans take the next one
    max_num_queued_reqs: int | None = None  # waiting requests beyond which new ones get 429
    max_queued_image_bytes: int = 2 * 2**30  # those of waiting requests; beyond it new ones get 429
    generation_config: str = "auto"  # auto: the model's own sampling defaults, vllm: none, or a directory
    # Sampling defaults over those, in the names of generation_config.json, e.g. {"temperature": 0.6}.
    override_generation_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # Images a prompt may have, {"image": 4}, or vLLM's longer {"image": {"count": 4}}; 999 where it says nothing.
    limit_mm_per_prompt: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # Bounds of images where a request sets none: min_pixels, max_pixels.
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # Hosts that images are fetched from; "*": any public one.
    allowed_media_domains: Sequence[str] = field(default=(), hash=False)
    allowed_local_media_path: str | None = None  # directory that file: URLs of images may name
    trust_remote_code: bool = False

    @property
    def max_images(self) -> int:
        """How many images a prompt may have: vLLM's default where limit_mm_per_prompt says nothing."""
        limit = self.limit_mm_per_prompt.get("image", 999)
        return limit["count"] if isinstance(limit, Mapping) else limit

    def __post_init__(self) -> None:
        def refuse(name: str, wants: str) -> None:
            raise ConfigError(f"{name}={getattr(self, name)!r}: {wants}")

        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype is not None:
            object.__setattr__(self, "dtype", OTHER_DTYPES.get(dtype, dtype))
        if not self.model:
            refuse("model", "give a directory, a .gguf file or a hub name")
        for name, choices in (
            ("dtype", (None, *get_args(Dtype))),
            ("kv_cache_dtype", get_args(KvCacheDtype)),
            ("load_format", get_args(LoadFormat)),
        ):
            if getattr(self, name) not in choices:
                refuse(name, f"use one of {', '.join(filter(None, choices))}")
        page_size = self.page_size
        is_number = isinstance(page_size, int) and page_size >= 8
        if page_size is not None and not (is_number and page_size & (page_size - 1) == 0):
            refuse("page_size", "use a power of two, at least 8")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory",
            "tensor_parallel_size",
            "nnodes",
            "max_num_queued_reqs",
            "max_queued_image_bytes",
            "data_parallel_size",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                refuse(name, "must be a whole number, at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            missing = "" if self.nnodes > 1 else "; say how many hosts there are with that"
            refuse("node_rank", f"must be from 0 to {self.nnodes - 1}, with nnodes={self.nnodes}{missing}")
        if self.nnodes > 1 and not self.master_addr:
            refuse("master_addr", "several hosts need it: the address of the host with node_rank 0")
        if not 0 < self.master_port < 65535:
            refuse("master_port", "must be from 1 to 65534")
        if self.tensor_parallel_size % self.nnodes:
            refuse(
                "tensor_parallel_size", f"must be a multiple of nnodes={self.nnodes}: hosts have equal shares"
            )
        if self.nnodes > 1 and self.data_parallel_size > 1:
            refuse(
                "data_parallel_size",
                "an engine over several hosts has no replicas beside it; start several servers",
            )
        if self.enable_expert_parallel and self.data_parallel_size > 1 and self.tensor_parallel_size == 1:
            refuse(
                "enable_expert_parallel",
                "experts are dealt out to the devices of one engine, and each of "
                f"data_parallel_size={self.data_parallel_size} has one; set tensor_parallel_size, or leave it out",
            )
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            refuse("gpu_memory_utilization", "must be above 0 and at most 1")
        if self.max_logprobs < 0 or self.max_logprobs > 64:
            refuse("max_logprobs", "must be from 0 to 64")
        if not self.generation_config:
            refuse("generation_config", "use auto, vllm, or a directory with a generation_config.json")
        if not isinstance(self.override_generation_config, Mapping):
            refuse("override_generation_config", 'give an object, e.g. {"temperature": 0.6}')
        for name in ("limit_mm_per_prompt", "mm_processor_kwargs"):
            if not isinstance(getattr(self, name), Mapping):
                refuse(name, "give an object")
        for kind, value in self.limit_mm_per_prompt.items():
            count = value.get("count") if isinstance(value, Mapping) else value
            is_number = isinstance(count, int) and not isinstance(count, bool) and count >= 0
            if kind not in ("image", "video", "audio") or not is_number:
                refuse("limit_mm_per_prompt", 'give numbers by kind, none below 0, e.g. {"image": 4}')
        # A string would be taken letter by letter.
        if isinstance(self.allowed_media_domains, str) or not all(self.allowed_media_domains):
            refuse("allowed_media_domains", 'give a list of hosts, e.g. ["images.example.com"]')
        if self.trust_remote_code:
            refuse("trust_remote_code", "code from checkpoints is never run; leave it off")
