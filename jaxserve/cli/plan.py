"""`jaxserve plan`: what serving a model would compile and hold in memory, without loading its weights."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from jaxserve.cli.config_file import add_config_flag
from jaxserve.cli.engine_flags import add_engine_flags, add_model_argument, engine_config

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.engine.settle import Settings


def add_parser(subparsers: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the command; returns its parser by name."""
    parser = subparsers.add_parser(
        "plan",
        allow_abbrev=False,
        help="show compiled shapes, memory and KV capacity without loading weights",
    )
    add_model_argument(parser)
    add_config_flag(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine_flags(parser)
    parser.set_defaults(run=run)
    return {"plan": parser}


def run(args: argparse.Namespace) -> int:
    """Print the plan; ConfigError if the model does not fit, with what it needs."""
    plan = make_plan(engine_config(args))
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        _print(plan)
    return 0


def make_plan(config: EngineConfig) -> dict[str, Any]:
    """What `config` comes to on this machine: settings, memory in bytes, KV capacity, every program."""
    from jaxserve.assembly import image_processor
    from jaxserve.loading.resolve import open_config

    config = replace(config, nnodes=1, node_rank=0, master_addr=None)  # devices of all hosts have the same
    model, _, path = open_config(config.model, config.revision)

    from jaxserve.engine.building import weights_bytes
    from jaxserve.engine.compile_estimate import compile_seconds
    from jaxserve.engine.host_limits import num_processors
    from jaxserve.engine.settle import layout_of, settle

    # A plan shall not take the memory that it speaks of: a server may be using it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device_bytes = weights_bytes(model, layout_of(config, model))
    settings = settle(config, model, device_bytes, processor=image_processor(config, model, path))
    programs = _programs(settings)
    return {
        "model": config.model,
        "path": str(path),
        "family": model.family,
        "device": settings.device_kind,
        "num_engines": config.data_parallel_size,  # each of which is what follows
        "devices": _devices(settings),
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "memory": _memory(settings),
        "kv": _kv_capacity(settings),
        "lattice": {
            "forwards": [{"name": shape.name, **asdict(shape)} for shape in settings.lattice.forwards],
            "samples": [{"name": shape.name, **asdict(shape)} for shape in settings.lattice.samples],
            "bursts": [shape.name for shape in settings.lattice.bursts],
            "towers": _towers(settings),
        },
        "programs": programs,
        "compile_seconds_estimate": round(
            compile_seconds(programs, settings.platform, model.num_layers, num_processors()), 1
        ),
    }


def _devices(settings: Settings) -> dict[str, Any]:
    layout = settings.layout
    return {"num_devices": layout.num_devices, "tensor": layout.tensor, "expert": layout.expert}


def _towers(settings: Settings) -> list[dict[str, Any]]:
    """Calls of the tower that encodes images, in a model that sees."""
    shapes = () if settings.tower is None else settings.tower.lattice.shapes
    return [{"name": shape.name, **asdict(shape)} for shape in shapes]


def _memory(settings: Settings) -> dict[str, int]:
    memory = settings.memory
    return {
        "available": memory.available,
        "weights": memory.weights,
        "activations": memory.activations,
        "sampler_state": memory.sampler_state,
        "image_cache": memory.image_cache,
        "kv_cache": memory.kv_cache,
        "total": memory.total,
    }


def _kv_capacity(settings: Settings) -> dict[str, Any]:
    num_pages = settings.memory.num_pages - 1  # page 0 is the dummy page
    num_tokens = num_pages * settings.page_size
    return {
        "dtype": settings.kv_dtype,
        "page_size": settings.page_size,
        "page_bytes": settings.memory.page,
        "num_pages": num_pages,
        "num_tokens": num_tokens,
        "full_length_sequences": round(num_tokens / settings.max_model_len, 2),
    }


def _programs(settings: Settings) -> list[str]:
    """Names of all programs that start-up compiles."""
    import jax.numpy as jnp

    from jaxserve.engine.books import make_books
    from jaxserve.models.on_devices import abstract_on_devices

    book, tower_book = make_books(
        settings, abstract_on_devices(settings.layout, jnp.dtype(settings.dtype))[1]
    )
    return [program.name for program in (*book, *(tower_book or ()))]


def _print(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    head = Table(title=f"{plan['model']} ({plan['family']}) on {plan['device']}", show_header=False)
    head.add_column()
    head.add_column(justify="right")
    for label, value in (
        ("engines (data_parallel_size)", str(plan["num_engines"])),
        (
            "devices of each (tensor x expert)",
            "{num_devices} ({tensor} x {expert})".format(**plan["devices"]),
        ),
        ("dtype", plan["dtype"]),
        ("context (max_model_len)", f"{plan['max_model_len']} tokens"),
        ("sequences in a step (max_num_seqs)", str(plan["max_num_seqs"])),
        ("tokens in a step (max_num_batched_tokens)", str(plan["max_num_batched_tokens"])),
    ):
        head.add_row(label, value)
    console.print(head)

    memory = Table(title="memory of each device", show_header=False)
    memory.add_column()
    memory.add_column(justify="right")
    for name in ("weights", "activations", "sampler_state", "image_cache", "kv_cache", "total", "available"):
        if name == "image_cache" and not plan["lattice"]["towers"]:
            continue
        memory.add_row(name.replace("_", " "), f"{plan['memory'][name] / 2**20:,.0f} MiB")
    kv = plan["kv"]
    memory.add_section()
    memory.add_row(
        "KV pages", f"{kv['num_pages']:,} of {kv['page_size']} tokens, {kv['page_bytes']:,} bytes each"
    )
    memory.add_row("KV capacity", f"{kv['num_tokens']:,} tokens")
    memory.add_row("sequences of full length", f"{kv['full_length_sequences']:.2f}")
    console.print(memory)

    shapes = Table("step", "tokens", "rows", "tile", "pages a row", title="forward passes")
    for shape in plan["lattice"]["forwards"]:
        numbers = (shape["num_tokens"], shape["num_rows"], shape["tile_size"], shape["max_pages"])
        step = f"{shape['kind']}, scores prompts" if shape["scores_prompts"] else shape["kind"]
        shapes.add_row(step, *map(str, numbers))
    console.print(shapes)
    if plan["lattice"]["towers"]:
        towers = Table("images a call", "patches each", title="encoding of images")
        for shape in plan["lattice"]["towers"]:
            towers.add_row(str(shape["num_images"]), f"{shape['num_patches']:,}")
        console.print(towers)
    samplers = Table("sampler", "logprobs", "rows", title="samplers")
    for variant, with_logprobs in dict.fromkeys(
        (shape["variant"], shape["with_logprobs"]) for shape in plan["lattice"]["samples"]
    ):
        rows = [
            str(shape["num_rows"])
            for shape in plan["lattice"]["samples"]
            if (shape["variant"], shape["with_logprobs"]) == (variant, with_logprobs)
        ]
        samplers.add_row(variant, "yes" if with_logprobs else "no", ", ".join(rows))
    console.print(samplers)
    programs = Table(title="programs", show_header=False)
    programs.add_column()
    programs.add_column(justify="right")
    for label, count in _program_counts(plan).items():
        programs.add_row(label, str(count))
    console.print(programs)
    console.print(
        f"{len(plan['programs'])} programs to compile, or to read from the cache on disk: the first start takes "
        f"about {plan['compile_seconds_estimate']:.0f} s for that (an estimate from typical figures)"
    )


def _program_counts(plan: dict[str, Any]) -> dict[str, int]:
    """How many programs there are of each kind; those of no shape in the lattice come last."""
    lattice = plan["lattice"]
    counts = {
        "forward passes": len(lattice["forwards"]),
        "samplers": len(lattice["samples"]),
        "bursts of decode steps": len(lattice["bursts"]),
        "encodings of images": len(lattice["towers"]),
    }
    counts["others: prompt log-probabilities, admissions, page tables"] = len(plan["programs"]) - sum(
        counts.values()
    )
    return {label: count for label, count in counts.items() if count}
