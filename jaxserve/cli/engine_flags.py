"""The flags that say how the engine runs, shared by every command that loads a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from jaxserve.cli.json_values import json_object
from jaxserve.cli.quantities import num_bytes, positive
from jaxserve.cli.vllm_flags import add_vllm_flags
from jaxserve.config import OTHER_DTYPES, Dtype, EngineConfig, KvCacheDtype, LoadFormat
from jaxserve.errors import ConfigError
from jaxserve.loading.fetch import FETCHABLE_MODELS
from jaxserve.vllm_options import ENGINE_OPTIONS

MODEL_HELP = f"directory, .gguf file, hub name, or {' or '.join(FETCHABLE_MODELS)} (downloaded on first use)"


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, which may also be given as `--model MODEL`."""
    parser.add_argument("model", nargs="?", action=_Model, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--model", action=_Model, metavar="MODEL", help="the same as MODEL")


def model_from(args: argparse.Namespace) -> str:
    """The model that a parsed command line names; ConfigError when there is none."""
    if args.model is None:
        raise ConfigError(f"MODEL is missing: give a {MODEL_HELP}")
    return args.model


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of EngineConfig, in vLLM's names, and those of vLLM that are refused."""
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add("--tokenizer", metavar="PATH", help="read the tokenizer from here rather than from the model")
    add("--revision", metavar="REV", help="branch, tag or commit of a model on the hub")
    add(
        "--load-format",
        choices=get_args(LoadFormat),
        default="auto",
        help="default: %(default)s",
    )
    add(
        "--dtype",
        choices=(*get_args(Dtype), *OTHER_DTYPES),
        default="auto",
        help="half is float16, float is float32 (default: float32 on CPU, bfloat16 on accelerators)",
    )
    add(
        "--kv-cache-dtype",
        choices=get_args(KvCacheDtype),
        default="auto",
        help="of KV pages: fp8 (fp8_e4m3) holds twice the tokens of bfloat16 (default: the model's dtype)",
    )
    add(
        "--max-model-len",
        type=positive,
        metavar="TOKENS",
        help="prompt + answer, for example 8192 or 8K (default: what the model was made for)",
    )
    add(
        "--page-size",
        "--block-size",
        type=positive,
        metavar="TOKENS",
        help="tokens of a KV page (default: 64 on GPUs, 16 elsewhere)",
    )
    add(
        "--max-num-seqs",
        type=positive,
        metavar="N",
        help="sequences in one step (default: 32 on CPU, else 256)",
    )
    add(
        "--max-num-batched-tokens",
        type=positive,
        metavar="TOKENS",
        help="token budget of one step (default: 256 on CPU, 64 for each multiprocessor of a large GPU, else 8192)",
    )
    add(
        "--data-parallel-size",
        "-dp",
        type=positive,
        default=1,
        metavar="N",
        help="engines side by side, each on devices of its own; requests go to the least busy one, or to the one "
        "that knows their beginning (default: %(default)s)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="share of device memory for weights, activations and KV pages; on CPU of free memory, and KV pages take "
        "1 GiB of it, or what one sequence of --max-model-len needs if that is more (default: %(default)s)",
    )
    add(
        "--kv-cache-memory",
        "--kv-cache-memory-bytes",
        type=num_bytes,
        metavar="BYTES",
        help="memory for KV pages of each device, for example 2G or 512M; overrides --gpu-memory-utilization, and on "
        "CPU its 1 GiB; more than --max-num-seqs sequences of --max-model-len need is not taken",
    )
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the pages of earlier prompts for prompts that begin alike (default: on)",
    )
    add(
        "--tensor-parallel-size",
        "-tp",
        type=positive,
        default=1,
        metavar="N",
        help="devices that share the model (default: %(default)s)",
    )
    add(
        "--enable-expert-parallel",
        action="store_true",
        help="give each of these devices experts of its own, not a share of every expert",
    )
    add(
        "--nnodes",
        type=positive,
        default=_environment("NNODES", "1"),
        metavar="N",
        help="hosts that share the model, each started with the same flags but its own --node-rank (default: "
        "$NNODES, or 1)",
    )
    add(
        "--node-rank",
        type=int,
        default=_environment("NODE_RANK", "0"),
        metavar="RANK",
        help="which of the hosts this is, from 0 on; 0 answers HTTP (default: $NODE_RANK, or 0)",
    )
    add(
        "--master-addr",
        default=_environment("MASTER_ADDR", None),
        metavar="ADDRESS",
        help="the host with rank 0, as the others reach it (default: $MASTER_ADDR)",
    )
    add(
        "--master-port",
        type=int,
        default=_environment("MASTER_PORT", "29501"),
        metavar="PORT",
        help="a port there; the one behind it is used too (default: $MASTER_PORT, or 29501)",
    )
    add("--forbid-recompile", action="store_true", help="make a compile after start-up an error")
    add(
        "--compile-cache-dir",
        metavar="DIR",
        help='compiled steps on disk (default: ~/.cache/jaxserve/xla; "" for none)',
    )
    add("--seed", type=int, help="makes requests without a seed of their own reproducible")
    add(
        "--max-logprobs",
        type=int,
        default=20,
        metavar="N",
        help="logprobs a request may ask for (default: %(default)s)",
    )
    add(
        "--max-num-queued-reqs",
        type=positive,
        metavar="N",
        help="waiting requests beyond which new ones get 429 (default: no limit)",
    )
    add(
        "--max-queued-image-bytes",
        type=num_bytes,
        default=2 * 2**30,
        metavar="BYTES",
        help="images of waiting requests, as files and then as pixels, beyond which new ones get 429 (default: 2G)",
    )
    add(
        "--generation-config",
        default="auto",
        metavar="SOURCE",
        help="of sampling defaults: auto (the model's generation_config.json), vllm (none), or a directory "
        "(default: %(default)s)",
    )
    add(
        "--override-generation-config",
        type=json_object('{"temperature": 0.6}'),
        default={},
        metavar="JSON",
        help='sampling defaults over those, e.g. \'{"temperature": 0.6, "max_new_tokens": 512}\'',
    )
    add(
        "--limit-mm-per-prompt",
        type=json_object('{"image": 4}'),
        default={},
        metavar="JSON",
        help="images of a prompt, e.g. '{\"image\": 4}' (default: 999)",
    )
    add(
        "--mm-processor-kwargs",
        type=json_object('{"max_pixels": 1003520}'),
        default={},
        metavar="JSON",
        help="bounds of images where a request sets none, e.g. '{\"max_pixels\": 1003520}'",
    )
    add(
        "--allowed-media-domains",
        nargs="+",
        action="extend",
        default=[],
        metavar="HOST",
        help='hosts that images are fetched from, "*" for all public ones (default: none)',
    )
    add(
        "--allowed-local-media-path",
        metavar="DIR",
        help="directory that file: URLs of images may name (default: none)",
    )
    add_vllm_flags(parser, ENGINE_OPTIONS)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The EngineConfig of a parsed command line; ConfigError for impossible values."""
    return EngineConfig(
        model=model_from(args),
        tokenizer=args.tokenizer,
        revision=args.revision,
        load_format=args.load_format,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len,
        page_size=args.page_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        data_parallel_size=args.data_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory=args.kv_cache_memory,
        enable_prefix_caching=args.enable_prefix_caching,
        tensor_parallel_size=args.tensor_parallel_size,
        enable_expert_parallel=args.enable_expert_parallel,
        nnodes=args.nnodes,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
        forbid_recompile=args.forbid_recompile,
        compile_cache_dir=args.compile_cache_dir,
        seed=args.seed,
        max_logprobs=args.max_logprobs,
        max_num_queued_reqs=args.max_num_queued_reqs,
        max_queued_image_bytes=args.max_queued_image_bytes,
        generation_config=args.generation_config,
        override_generation_config=args.override_generation_config,
        limit_mm_per_prompt=args.limit_mm_per_prompt,
        mm_processor_kwargs=args.mm_processor_kwargs,
        allowed_media_domains=tuple(args.allowed_media_domains),
        allowed_local_media_path=args.allowed_local_media_path,
    )


def engine_argv(config: EngineConfig) -> list[str]:
    """The flags, MODEL aside, that make another command build `config`."""
    argv: list[str] = []
    default = EngineConfig(model=config.model)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(default, field.name):
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple):
            argv.extend(f"{flag}={item}" for item in value)
        elif isinstance(value, Mapping):
            argv.append(f"{flag}={json.dumps(dict(value))}")
        else:
            argv.append(f"{flag}={value}")
    return argv


def given_engine_flags(args: argparse.Namespace) -> list[str]:
    """Engine flags whose value is not the default: for commands that may run without an engine."""
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    defaults = vars(parser.parse_args([]))
    return ["--" + name.replace("_", "-") for name, value in defaults.items() if getattr(args, name) != value]


def _environment(name: str, otherwise: str | None) -> str | None:
    """A default from the environment, which argparse reads like a flag's value."""
    return os.environ.get(name) or otherwise


class _Model(argparse.Action):
    """Takes the model from either place, and refuses two different ones."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values is self.default:
            return  # argparse calls the positional with its default where there is none
        given = getattr(namespace, "model_given", values)
        if given != values:
            raise ConfigError(f"two models are given: {given} and {values}")
        namespace.model = namespace.model_given = values
